"""Pieces of sound as clients send them, checked and brought to mono at 16 kHz."""

from collections import deque

import soxr
import torch
from einops import reduce
from torch import Tensor

from avatar.audio.alignment import BLOCK_SAMPLES, MAX_RATE_HZ, MIN_RATE_HZ, SAMPLE_RATE_HZ
from avatar.types import AudioPiece

MAX_AMPLITUDE = 8.0
"""Lossy decoders overshoot full scale a little; anything beyond 18 dB is not sound in [-1, 1]."""

SETTLE_S = 0.02
"""Sound after which a resampler that began in mid-stream gives what one that heard everything gives, to 1e-6."""


def check_piece(piece: AudioPiece) -> None:
    """ValueError if the piece is not (a, s) float32 sound of 1 or 2 channels, 8 to 48 kHz, finite and within +-8."""
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


class Resampler:
    """A stream of sound of one rate, to mono at 16 kHz.

    Output lags behind input by at most 0.12 s and does not depend on how the input is cut. Sound that has 16 kHz
    already passes through untouched. Of every other rate that is a multiple of 25 Hz each block is resampled by itself,
    with the sound around it: a stream that is rebuilt at a block goes on with the same bytes.

    before: (a, s) sound before the stream's, of which nothing comes out; None where there was none.
    """

    def __init__(self, rate_hz: int, before: Tensor | None = None) -> None:
        self.rate_hz = rate_hz
        # At other rates blocks do not end with a sample.
        self._block = rate_hz * BLOCK_SAMPLES // SAMPLE_RATE_HZ if rate_hz % 25 == 0 else None
        self._room = self._block
        self._before = torch.zeros(0) if before is None else reduce(before, "a s -> s", "mean")
        self._segments: deque[_Segment] = deque()
        if rate_hz != SAMPLE_RATE_HZ:
            self._begin()

    def __call__(self, samples: Tensor, is_last: bool) -> Tensor:
        """What is ready of the sound at 16 kHz, (s,); all of it if these samples (a, s) are the last."""
        mono = reduce(samples, "a s -> s", "mean")
        if not self._segments:
            return mono
        ready = []
        while self._room is not None and len(mono) >= self._room:
            block, mono = mono[: self._room], mono[self._room :]
            ready.append(self._feed(block, is_last=False))
            self._begin()
        ready.append(self._feed(mono, is_last))
        return torch.cat(ready)

    def _begin(self) -> None:
        self._segments.append(_Segment(self.rate_hz, self._before, None if self._block is None else BLOCK_SAMPLES))
        self._room = self._block

    def _feed(self, mono: Tensor, is_last: bool) -> Tensor:
        if self._room is not None:
            self._room -= len(mono)
        self._before = torch.cat([self._before, mono])[-(self.rate_hz // 25) :]
        for segment in self._segments:
            segment.feed(mono, is_last)
        ready = [self._segments[0].take()]
        while len(self._segments) > 1 and not self._segments[0].num_left:
            self._segments.popleft()
            ready.append(self._segments[0].take())
        return torch.cat(ready)


class _Segment:
    """A resampler of its own for the sound from one cut to the next, which goes on until all of that has come out.

    before: (s,) sound before the cut. num_left: samples at 16 kHz that are yet to come out; None: no end is known.
    """

    def __init__(self, rate_hz: int, before: Tensor, num_left: int | None) -> None:
        self.num_left = num_left
        self._stream = soxr.ResampleStream(rate_hz, SAMPLE_RATE_HZ, 1, dtype="float32", quality="HQ")
        self._num_hidden = round(len(before) * SAMPLE_RATE_HZ / rate_hz)
        self._ready = [torch.zeros(0)]
        self.feed(before, is_last=False)

    def feed(self, mono: Tensor, is_last: bool) -> None:
        sound = torch.from_numpy(self._stream.resample_chunk(mono.numpy(), last=is_last))
        hidden = min(self._num_hidden, len(sound))
        self._num_hidden -= hidden
        self._ready.append(sound[hidden:])

    def take(self) -> Tensor:
        """What has come out since it was asked last."""
        sound = torch.cat(self._ready)[: self.num_left]
        if self.num_left is not None:
            self.num_left -= len(sound)
        self._ready = [torch.zeros(0)]
        return sound
