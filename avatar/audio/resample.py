"""Validation of audio pieces, and their resampling to mono at 16 kHz.

Axes: a audio channels, s samples.
"""

from collections import deque

import soxr
import torch
from einops import reduce
from torch import Tensor

from avatar.audio.alignment import MAX_RATE_HZ, MIN_RATE_HZ, SAMPLE_RATE_HZ
from avatar.types import AudioPiece

MAX_AMPLITUDE = 8.0
"""Lossy decoders overshoot full scale a little; a signal 18 dB above it is not scaled to [-1, 1]."""

LAG_S = 0.12
"""The longest time by which a resampler's output lags behind its input."""

SETTLE_S = 0.02
"""After so much audio, a resampler started in mid-stream equals one that saw the whole stream, to 1e-6."""


def check_piece(piece: AudioPiece) -> None:
    """Raise ValueError unless the piece is (a, s) float32, 1 or 2 channels, 8 to 48 kHz, finite and within +-8."""
    samples = piece.samples
    if not MIN_RATE_HZ <= piece.rate_hz <= MAX_RATE_HZ:
        raise ValueError(f"audio must have a rate of {MIN_RATE_HZ} to {MAX_RATE_HZ} Hz, got {piece.rate_hz}")
    if samples.dtype != torch.float32:
        raise ValueError(f"audio samples must be float32 in [-1, 1], got {samples.dtype}; divide PCM16 by 32768")
    if samples.ndim != 2 or samples.shape[0] not in (1, 2):
        raise ValueError(f"audio must be (1 or 2 channels, samples), got shape {tuple(samples.shape)}")
    if not samples.isfinite().all():
        raise ValueError("audio samples must be finite numbers, got NaN or infinity")
    if samples.numel() and (peak := float(samples.abs().amax())) > MAX_AMPLITUDE:
        raise ValueError(f"audio samples must be in [-1, 1], got {peak:g}; divide PCM16 by 32768")


class MonoResampler:
    """A streaming resampler from one rate to mono at 16 kHz.

    Output lags behind input by at most LAG_S and does not depend on how the input is cut. Audio at 16 kHz passes
    through unchanged. At every other rate that is a multiple of 25 Hz, each block has a filter of its own (`_Segment`),
    primed with the audio before the block: a stream that is resumed at a block continues with the same bytes.

    block_samples: samples of a block at 16 kHz. preceding: (a, s) audio before the stream, which primes the first
    filter; None if there is none.
    """

    def __init__(self, rate_hz: int, block_samples: int, preceding: Tensor | None = None) -> None:
        self.rate_hz = rate_hz
        # At other rates blocks do not end on a sample, and one filter serves the whole stream.
        self._block_out = block_samples if rate_hz % 25 == 0 else None
        self._block_in = rate_hz * block_samples // SAMPLE_RATE_HZ
        self._num_missing = self._block_in if self._block_out else None  # until the block ends
        self._preceding = torch.zeros(0) if preceding is None else reduce(preceding, "a s -> s", "mean")
        self._segments: deque[_Segment] = deque()
        if rate_hz != SAMPLE_RATE_HZ:
            self._start_segment()

    def __call__(self, samples: Tensor, is_last: bool) -> Tensor:
        """Resample the stream's next samples (a, s). Returns what is ready, (s,): everything if they are the last."""
        mono = reduce(samples, "a s -> s", "mean")
        if not self._segments:
            return mono
        ready = []
        while self._num_missing is not None and len(mono) >= self._num_missing:
            block_end, mono = mono[: self._num_missing], mono[self._num_missing :]
            ready.append(self._feed(block_end, is_last=False))
            self._start_segment()
        ready.append(self._feed(mono, is_last))
        return torch.cat(ready)

    def _start_segment(self) -> None:
        self._segments.append(_Segment(self.rate_hz, self._preceding, self._block_out))
        self._num_missing = self._block_in if self._block_out else None

    def _feed(self, mono: Tensor, is_last: bool) -> Tensor:
        if self._num_missing is not None:
            self._num_missing -= len(mono)
        self._preceding = torch.cat([self._preceding, mono])[-(self.rate_hz // 25) :]
        for segment in self._segments:
            segment.feed(mono, is_last)
        ready = [self._segments[0].take()]
        while len(self._segments) > 1 and not self._segments[0].num_remaining:
            self._segments.popleft()
            ready.append(self._segments[0].take())
        return torch.cat(ready)


class _Segment:
    """The filter of one block. It is fed beyond the block's end until the whole block has come out.

    preceding: (s,) audio before the block, which primes the filter and is cut from the output.
    num_remaining: samples at 16 kHz still to come out; None for a stream without blocks.
    """

    def __init__(self, rate_hz: int, preceding: Tensor, num_remaining: int | None) -> None:
        self.num_remaining = num_remaining
        self._stream = soxr.ResampleStream(rate_hz, SAMPLE_RATE_HZ, 1, dtype="float32", quality="HQ")
        self._num_hidden = round(len(preceding) * SAMPLE_RATE_HZ / rate_hz)
        self._ready = [torch.zeros(0)]
        self.feed(preceding, is_last=False)

    def feed(self, mono: Tensor, is_last: bool) -> None:
        """Filter the next samples (s,) at the input's rate."""
        audio = torch.from_numpy(self._stream.resample_chunk(mono.numpy(), last=is_last))
        hidden = min(self._num_hidden, len(audio))
        self._num_hidden -= hidden
        self._ready.append(audio[hidden:])

    def take(self) -> Tensor:
        """Return the output since the last call, (s,)."""
        audio = torch.cat(self._ready)[: self.num_remaining]
        if self.num_remaining is not None:
            self.num_remaining -= len(audio)
        self._ready = [torch.zeros(0)]
        return audio
