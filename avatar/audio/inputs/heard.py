"""Audio of the other person, as far as it has arrived, at its place in the stream's time.

Nothing waits for it. Pieces are kept at their own rate, and each window is resampled by itself, so a window depends on
the samples in it alone, and a stream that is rebuilt encodes the same bytes. Axes: a audio channels, s samples.
"""

from collections import deque
from dataclasses import dataclass, field

import soxr
import torch
from einops import reduce
from torch import Tensor
from torch.nn import functional

from avatar.audio.alignment import SAMPLE_RATE_HZ
from avatar.audio.resample import check_piece
from avatar.types import AudioPiece, HeardAudio


@dataclass(eq=False)
class HeardWindow:
    """The pieces of the other person's audio that later blocks may need.

    rate_hz: of all pieces; 0 before the first. pieces: number of the first sample since the stream's start, and mono
    samples (s,).
    """

    rate_hz: int = 0
    pieces: deque[tuple[int, Tensor]] = field(default_factory=deque)

    def add(self, heard: HeardAudio, end: int) -> None:
        """Keep a piece. end: where the stream's own audio ends, in samples at 16 kHz.

        ValueError if the audio is invalid, changes its rate, or lies behind the end: a block would have to wait for it.
        """
        check_piece(AudioPiece(heard.samples, heard.rate_hz))
        if self.rate_hz not in (0, heard.rate_hz):
            raise ValueError(f"audio of the other person must keep its rate of {self.rate_hz} Hz, got {heard.rate_hz}")
        stop, limit = heard.first_sample + heard.samples.shape[1], -(-end * heard.rate_hz // SAMPLE_RATE_HZ)
        if stop > limit:
            raise ValueError(f"audio of the other person ends at sample {stop}, behind the stream's own, {limit}")
        self.rate_hz = heard.rate_hz
        if heard.samples.shape[1]:
            self.pieces.append((heard.first_sample, reduce(heard.samples, "a s -> s", "mean")))

    def window(self, end: int, num_samples: int) -> Tensor | None:
        """Return num_samples up to sample `end`, both at 16 kHz: (s,), silence where none has arrived; None if all is.

        Pieces that lie before the window are dropped.
        """
        first, stop = (max(0, at) * self.rate_hz // SAMPLE_RATE_HZ for at in (end - num_samples, end))
        while self.pieces and self.pieces[0][0] + len(self.pieces[0][1]) <= first:
            self.pieces.popleft()
        window, is_empty = torch.zeros(stop - first), True
        for start, samples in self.pieces:
            taken = samples[max(0, first - start) : max(0, stop - start)]
            at = max(0, start - first)
            window[at : at + len(taken)] = taken
            is_empty = is_empty and not len(taken)
        if is_empty:
            return None
        if self.rate_hz != SAMPLE_RATE_HZ:
            window = torch.from_numpy(soxr.resample(window.numpy(), self.rate_hz, SAMPLE_RATE_HZ, "HQ"))[-num_samples:]
        return functional.pad(window, (num_samples - len(window), 0))
