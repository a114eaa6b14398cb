"""An engine's sound: PCM16, bare or as WAV, in pieces of any size; to mono samples, and to the format of a stream.

Axes: s samples.
"""

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import soxr
from numpy.typing import NDArray

from avatar.errors import VoiceFailed

MIN_RATE_HZ, MAX_RATE_HZ = 8000, 192_000
# A WAV file's chunks before its samples.
MAX_HEADER_BYTES = 64 << 10
PCM, EXTENSIBLE = 1, 0xFFFE
# Programs that do not know yet how much sound follows write a size of 0 or, about, the largest one.
UNKNOWN_SIZE = 0x7FFFF000
# Amplitude below which a sample is silent: -40 dB.
SILENCE = 0.01
Samples = NDArray[np.float32]


class PcmReader:
    """Reads mono or stereo PCM16 as (s,) float32 in [-1, 1]; stereo is averaged.

    rate_hz: sample rate; of a WAV file once its header has been read.
    """

    def __init__(self, rate_hz: int | None = None) -> None:
        """rate_hz: of mono samples without a header; None if there must be one."""
        self.rate_hz = 0
        self._bare_rate_hz = rate_hz
        self._num_channels = 1
        self._is_header_read = False
        self._data = b""
        # Bytes of samples still to come; None without a limit.
        self._num_bytes: int | None = None

    def read(self, data: bytes) -> Samples:
        """Return the samples that the next bytes complete. VoiceFailed if they are not such sound."""
        self._data += data
        if not self._is_header_read and not self._read_header():
            return np.zeros(0, np.float32)
        if self._num_bytes is not None:
            # Other chunks may follow the samples.
            self._data = self._data[: self._num_bytes]
        size = 2 * self._num_channels
        end = len(self._data) // size * size
        whole, self._data = self._data[:end], self._data[end:]
        if self._num_bytes is not None:
            self._num_bytes -= len(whole)
        samples = np.frombuffer(whole, "<i2").astype(np.float32).reshape(-1, self._num_channels) / 32768
        return np.asarray(samples.mean(axis=1), np.float32)

    def _read_header(self) -> bool:
        """Read the chunks up to the samples; return whether they have all arrived."""
        if len(self._data) < 12:
            return False
        if self._data[:4] != b"RIFF" or self._data[8:12] != b"WAVE":
            if self._bare_rate_hz is None:
                raise VoiceFailed("the engine's sound is no WAV file")
            self.rate_hz, self._is_header_read = self._bare_rate_hz, True
            return True
        at = 12
        while len(self._data) >= at + 8:
            name, size = struct.unpack_from("<4sI", self._data, at)
            if name == b"data":
                if not self.rate_hz:
                    raise VoiceFailed("the engine's WAV file has no format")
                self._data, self._is_header_read = self._data[at + 8 :], True
                self._num_bytes = size if 0 < size < UNKNOWN_SIZE else None
                return True
            if len(self._data) < at + 8 + size:
                break
            if name == b"fmt ":
                self._read_format(self._data[at + 8 : at + 8 + size])
            at += 8 + size + size % 2
        if len(self._data) > MAX_HEADER_BYTES:
            raise VoiceFailed("the engine's WAV file has no samples")
        return False

    def _read_format(self, chunk: bytes) -> None:
        if len(chunk) < 16:
            raise VoiceFailed("the engine's WAV file has a broken format")
        kind, num_channels, rate_hz, _, _, num_bits = struct.unpack_from("<HHIIHH", chunk)
        if kind not in (PCM, EXTENSIBLE) or num_bits != 16 or num_channels not in (1, 2):
            raise VoiceFailed(f"the engine's sound has {num_channels} channels of {num_bits} bits, expected PCM16")
        if not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ:
            raise VoiceFailed(f"the engine's sound has {rate_hz} Hz, expected {MIN_RATE_HZ} to {MAX_RATE_HZ}")
        self.rate_hz, self._num_channels = rate_hz, num_channels


@dataclass(frozen=True)
class StreamFormat:
    """Format of a stream's speech. encoding: `pcm16` or `float32`."""

    encoding: str
    rate_hz: int
    num_channels: int

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample of all channels."""
        return (4 if self.encoding == "float32" else 2) * self.num_channels

    def encode(self, samples: Samples) -> bytes:
        """Return (s,) float32 samples as the stream's bytes, the same in all channels; they are clipped to [-1, 1]."""
        clipped = np.repeat(np.clip(samples, -1.0, 1.0), self.num_channels)
        if self.encoding == "float32":
            return clipped.astype("<f4").tobytes()
        return np.round(clipped * 32767).astype("<i2").tobytes()


class SentenceResampler:
    """Resamples one sentence, in pieces, to the rate of a stream."""

    def __init__(self, rate_hz: int) -> None:
        """rate_hz: of the stream."""
        self._rate_hz = rate_hz
        self._stream: Any = None
        self._from_hz = 0

    def __call__(self, samples: Samples, rate_hz: int) -> Samples:
        """Return what the next (s,) samples complete. VoiceFailed if their rate differs from the piece before."""
        if not self._from_hz:
            self._from_hz = rate_hz
            if rate_hz != self._rate_hz:
                self._stream = soxr.ResampleStream(rate_hz, self._rate_hz, 1, dtype="float32")
        if rate_hz != self._from_hz:
            raise VoiceFailed(f"the engine's sound changes from {self._from_hz} to {rate_hz} Hz")
        return samples if self._stream is None else np.asarray(self._stream.resample_chunk(samples), np.float32)

    def finish(self) -> Samples:
        """Return the rest."""
        end = np.zeros(0, np.float32)
        return end if self._stream is None else np.asarray(self._stream.resample_chunk(end, last=True), np.float32)


def trailing_silence_s(samples: Samples, rate_hz: int) -> float:
    """Return the seconds after the last of (s,) samples that is not silent."""
    loud = np.flatnonzero(np.abs(samples) > SILENCE)
    return float(len(samples) - 1 - loud[-1]) / rate_hz if len(loud) else 0.0
