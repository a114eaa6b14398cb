"""What a stream remembers of all its sound, beyond the window that it keeps: four numbers."""

import math
import struct
from dataclasses import dataclass, replace

from torch import Tensor

VARIANCE_FLOOR = 1e-6
"""Sound below -60 dB is silence and is not stretched to full scale."""

_LAYOUT = struct.Struct("<4d")


@dataclass(frozen=True)
class Statistics:
    """Running loudness of a stream.

    count, mean, m2: number of samples, their mean, and the sum of squared distances from it, in float64. They begin
        with a prior of 2 s of sound of mean 0 and standard deviation 0.05, so that leading silence stays silence.
    peak: the greatest log10 mel power yet. It begins with that of quiet speech.
    """

    count: float = 32000.0
    mean: float = 0.0
    m2: float = 32000.0 * 0.05**2
    peak: float = 0.0

    @classmethod
    def from_bytes(cls, data: bytes) -> "Statistics":
        """The inverse of `to_bytes`. ValueError if the bytes are not finite statistics."""
        if len(data) != _LAYOUT.size:
            raise ValueError(f"audio statistics must have {_LAYOUT.size} bytes, got {len(data)}")
        statistics = cls(*_LAYOUT.unpack(data))
        if not all(map(math.isfinite, _LAYOUT.unpack(data))) or statistics.count <= 0 or statistics.m2 < 0:
            raise ValueError(f"audio statistics must be finite, with count > 0 and m2 >= 0, got {statistics}")
        return statistics

    def to_bytes(self) -> bytes:
        """32 bytes: four little-endian float64."""
        return _LAYOUT.pack(self.count, self.mean, self.m2, self.peak)

    def with_samples(self, samples: Tensor) -> "Statistics":
        """These and the samples (s,). Source: Chan, Golub, LeVeque 1979, the moments of two sets joined."""
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

    def with_peak(self, peak: float) -> "Statistics":
        return replace(self, peak=max(self.peak, peak))

    def normalise(self, samples: Tensor) -> Tensor:
        """Samples (s,) brought to mean 0 and variance 1 of the stream so far."""
        return standardise(samples, self.mean, max(self.m2 / self.count, VARIANCE_FLOOR))


def standardise(samples: Tensor, mean: float, variance: float) -> Tensor:
    """Samples (s,) of that mean and variance brought to 0 and 1. Source: transformers' Wav2Vec2FeatureExtractor."""
    return (samples - mean) / math.sqrt(variance + 1e-7)
