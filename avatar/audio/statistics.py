"""Running statistics of a stream's audio: the four numbers that it keeps of everything before its window.

wav2vec2 normalises its input by mean and variance, Whisper compresses its log-mel below a peak. A file has these from
its whole length, a stream from its audio so far. Axes: s samples.
"""

import math
import struct
from dataclasses import dataclass, replace

from torch import Tensor

VARIANCE_FLOOR = 1e-6
"""Audio below -60 dB is silence and is not amplified to full scale."""

_LAYOUT = struct.Struct("<4d")
NUM_BYTES = _LAYOUT.size


@dataclass(frozen=True)
class AudioStatistics:
    """Running mean, variance and peak of a stream.

    count, mean, m2: number of samples, their mean, and the sum of squared deviations from it, in float64. They start
        from a prior of 2 s of audio of mean 0 and standard deviation 0.05, so that leading silence stays silence.
    peak: the greatest log10 mel power so far. It starts at that of quiet speech.
    """

    count: float = 32000.0
    mean: float = 0.0
    m2: float = 32000.0 * 0.05**2
    peak: float = 0.0

    @classmethod
    def from_bytes(cls, data: bytes) -> "AudioStatistics":
        """Return the inverse of `to_bytes`. ValueError if the bytes are not finite statistics."""
        if len(data) != _LAYOUT.size:
            raise ValueError(f"audio statistics must have {_LAYOUT.size} bytes, got {len(data)}")
        statistics = cls(*_LAYOUT.unpack(data))
        if not all(map(math.isfinite, _LAYOUT.unpack(data))) or statistics.count <= 0 or statistics.m2 < 0:
            raise ValueError(f"audio statistics must be finite, with count > 0 and m2 >= 0, got {statistics}")
        return statistics

    def to_bytes(self) -> bytes:
        """Return 32 bytes: count, mean, m2 and peak as little-endian float64."""
        return _LAYOUT.pack(self.count, self.mean, self.m2, self.peak)

    def with_samples(self, samples: Tensor) -> "AudioStatistics":
        """Return the statistics with samples (s,) added.

        Source: the parallel update of mean and variance, Chan, Golub, LeVeque 1979.
        """
        if not len(samples):
            return self
        values = samples.double()
        added, mean = len(values), float(values.mean())
        count, delta = self.count + added, mean - self.mean
        m2 = float((values - mean).square().sum())
        return replace(
            self,
            count=count,
            mean=self.mean + delta * added / count,
            m2=self.m2 + m2 + delta * delta * self.count * added / count,
        )

    def with_peak(self, peak: float) -> "AudioStatistics":
        """Return the statistics with a log10 mel power added."""
        return replace(self, peak=max(self.peak, peak))

    def normalise(self, samples: Tensor) -> Tensor:
        """Normalise samples (s,) by mean and variance of the stream so far."""
        return standardise(samples, self.mean, max(self.m2 / self.count, VARIANCE_FLOOR))


def standardise(samples: Tensor, mean: float, variance: float) -> Tensor:
    """Map samples (s,) of that mean and variance to mean 0 and variance 1.

    Source: transformers' Wav2Vec2FeatureExtractor.
    """
    return (samples - mean) / math.sqrt(variance + 1e-7)
