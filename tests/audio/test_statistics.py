import math

import pytest
import torch
from torch import Tensor

from avatar.audio.statistics import AudioStatistics


def test_running_moments_equal_those_of_all_samples(speech: Tensor) -> None:
    statistics = AudioStatistics()
    for start in range(0, speech.shape[1], 7680):
        statistics = statistics.with_samples(speech[0, start : start + 7680])
    prior = torch.tensor([0.05, -0.05], dtype=torch.float64).repeat(16000)
    everything = torch.cat([prior, speech[0].double()])
    assert statistics.count == len(everything)
    assert math.isclose(statistics.mean, float(everything.mean()), rel_tol=1e-9)
    assert math.isclose(statistics.m2 / statistics.count, float(everything.var(correction=0)), rel_tol=1e-9)


def test_leading_silence_stays_silence() -> None:
    noise = 1e-4 * torch.randn(16000 * 60, generator=torch.Generator().manual_seed(0))
    assert AudioStatistics().with_samples(noise[:16000]).normalise(noise).std() < 0.01
    assert AudioStatistics().with_samples(noise).normalise(noise).std() < 0.1, "nor is a minute of it amplified"


def test_speech_is_normalised_to_unit_variance(speech: Tensor) -> None:
    assert 0.8 < AudioStatistics().with_samples(speech[0]).normalise(speech[0]).std() < 1.2


def test_statistics_round_trip_through_bytes(speech: Tensor) -> None:
    statistics = AudioStatistics().with_samples(speech[0]).with_peak(1.25)
    assert len(statistics.to_bytes()) == 32
    assert AudioStatistics.from_bytes(statistics.to_bytes()) == statistics


@pytest.mark.parametrize(
    "data", [b"", b"0" * 31, AudioStatistics(mean=math.nan).to_bytes(), AudioStatistics(count=0).to_bytes()]
)
def test_invalid_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="audio statistics must"):
        AudioStatistics.from_bytes(data)
