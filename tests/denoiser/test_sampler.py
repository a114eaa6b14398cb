"""Tests of avatar.denoiser.sampler."""

from collections import Counter

import pytest
import torch

from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.sampler import (
    SEGMENT_BLOCKS,
    NoiseHistory,
    clip_noise,
    correlated_noise,
    euler_step,
    mix_seed,
    noise,
    sink_distance,
)
from avatar.types import Session
from tests.denoiser.conftest import randn, random_session


def test_the_last_step_gives_the_clean_latent() -> None:
    clean, noisy = randn(1, 4, 2, 8, 8), randn(2, 4, 2, 8, 8)
    x = 0.75 * noisy + 0.25 * clean
    torch.testing.assert_close(euler_step(x, noisy - clean, 0.75, 0.0), clean)


def test_two_steps_along_one_velocity_equal_one() -> None:
    x, velocity = randn(1, 4, 2, 8, 8), randn(2, 4, 2, 8, 8)
    halfway = euler_step(euler_step(x, velocity, 0.9, 0.75), velocity, 0.75, 0.5)
    torch.testing.assert_close(halfway, euler_step(x, velocity, 0.9, 0.5))


def test_noise_depends_on_seed_and_block_only(config: NetworkConfig) -> None:
    one, other = random_session(config, "one", 7), random_session(config, "other", 8)
    first = noise(one, 5, 2)
    noise(other, 3, 2)
    torch.rand(10)
    again = noise(Session("renamed", 7, torch.zeros_like(one.motion)), 5, 2)
    assert first.shape == (4, 2, 8, 12)
    assert torch.equal(first, again)
    assert not torch.equal(first, noise(one, 6, 2))
    assert not torch.equal(first, noise(other, 5, 2))


def test_noise_is_standard_normal(config: NetworkConfig) -> None:
    session = random_session(config, "one", 2**63 - 1)
    drawn = torch.stack([noise(session, index, 2) for index in range(50)])
    assert abs(drawn.mean().item()) < 0.02
    assert abs(drawn.std().item() - 1) < 0.02


def test_clip_noise_is_one_draw_per_clip(config: NetworkConfig) -> None:
    session, draw = random_session(config, "one", 2**63 - 1), clip_noise(3)
    for clip, seed in enumerate((2**63 - 1, 0)):
        whole = torch.randn(4, 6, 8, 12, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(torch.cat([draw(session, 3 * clip + block, 2) for block in range(3)], dim=1), whole)


def test_correlated_noise_is_standard_normal_and_as_correlated_as_asked(config: NetworkConfig) -> None:
    session, history = random_session(config, "one", 3), NoiseHistory()
    frames = torch.cat([correlated_noise(noise, session, index, 2, 0.8, history) for index in range(100)], dim=1)
    assert abs(frames.std().item() - 1) < 0.03
    for lag in (1, 2, 3):
        correlation = (frames[:, lag:] * frames[:, :-lag]).mean().item()
        assert abs(correlation - 0.8**lag) < 0.03


@pytest.mark.parametrize("index", [0, 1, SEGMENT_BLOCKS - 1, SEGMENT_BLOCKS, 3 * SEGMENT_BLOCKS, 1000])
def test_correlated_noise_depends_on_seed_and_block_only(config: NetworkConfig, index: int) -> None:
    session, history = random_session(config, "one", 3), NoiseHistory()
    for earlier in range(max(0, index - 2 * SEGMENT_BLOCKS), index):
        correlated_noise(noise, session, earlier, 1, 0.6, history)
    carried = correlated_noise(noise, session, index, 1, 0.6, history)
    assert torch.equal(carried, correlated_noise(noise, session, index, 1, 0.6, NoiseHistory()))


def test_without_correlation_the_noise_is_the_one_of_before(config: NetworkConfig) -> None:
    session = random_session(config, "one", 3)
    assert torch.equal(correlated_noise(noise, session, 5, 2, 0.0, NoiseHistory()), noise(session, 5, 2))


def test_sink_distances_are_uniform_over_their_range(config: NetworkConfig) -> None:
    session = random_session(config, "one", 7)
    drawn = Counter(sink_distance(session, index, level, (4, 6)) for index in range(300) for level in range(4))
    assert sorted(drawn) == [4, 5, 6]
    assert min(drawn.values()) > 300


def test_levels_draw_independent_sink_distances(config: NetworkConfig) -> None:
    session = random_session(config, "one", 7)
    zero, one = ([sink_distance(session, index, level, (4, 30)) for index in range(20)] for level in (0, 1))
    assert zero != one
    assert zero == [sink_distance(session, index, 0, (4, 30)) for index in range(20)]


@pytest.mark.parametrize("other", [(1, "noise", 3), (2, "noise", 2), (1, "sink", 2), (12, "noise", 2)])
def test_every_part_changes_the_seed(other: tuple[int | str, ...]) -> None:
    assert mix_seed(*other) != mix_seed(1, "noise", 2)
    assert 0 <= mix_seed(*other) < 2**63
