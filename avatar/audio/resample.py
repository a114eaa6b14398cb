"""Pieces of sound as clients send them, checked and brought to mono at 16 kHz."""

import soxr
import torch
from einops import reduce
from torch import Tensor

from avatar.audio.clock import MAX_RATE_HZ, MIN_RATE_HZ, SAMPLE_RATE_HZ
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
    already passes through untouched.

    before: (a, s) sound before the stream's, of which nothing comes out; None where there was none.
    """

    def __init__(self, rate_hz: int, before: Tensor | None = None) -> None:
        self.rate_hz = rate_hz
        self._stream = None
        self._hidden = 0
        if rate_hz != SAMPLE_RATE_HZ:
            self._stream = soxr.ResampleStream(rate_hz, SAMPLE_RATE_HZ, 1, dtype="float32", quality="HQ")
            if before is not None:
                self._hidden = round(before.shape[1] * SAMPLE_RATE_HZ / rate_hz)
                self(before, is_last=False)

    def __call__(self, samples: Tensor, is_last: bool) -> Tensor:
        """What is ready of the sound at 16 kHz, (s,); all of it if these samples (a, s) are the last."""
        mono = reduce(samples, "a s -> s", "mean")
        if self._stream is None:
            return mono
        sound = torch.from_numpy(self._stream.resample_chunk(mono.numpy(), last=is_last))
        hidden = min(self._hidden, len(sound))
        self._hidden -= hidden
        return sound[hidden:]
