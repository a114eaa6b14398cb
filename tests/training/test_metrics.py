import numpy as np
import pytest
from numpy.typing import NDArray

from training.eval.metrics import (
    Metric,
    best_lag,
    corners,
    correlation,
    distance,
    edge_energy,
    flicker,
    ratio_metric,
    ratio_to_chance,
    sharpness,
    speaks,
    stillness_db,
)


def curve(num_frames: int = 60, seed: int = 0) -> NDArray[np.float64]:
    """Return smooth noise, like the opening of a mouth."""
    return np.convolve(np.random.default_rng(seed).normal(size=num_frames + 4), np.ones(5) / 5, "valid")


def test_a_curve_correlates_with_itself_alone() -> None:
    assert correlation(curve(), curve()) == pytest.approx(1)
    assert abs(correlation(curve(400), curve(400, seed=1))) < 0.3


def test_a_still_curve_correlates_with_nothing() -> None:
    assert correlation(np.ones(60), curve()) == 0


@pytest.mark.parametrize("lag", [-3, 0, 2])
def test_a_late_mouth_has_a_positive_lag(lag: int) -> None:
    truths = [curve(seed=seed) for seed in range(3)]
    assert best_lag([(np.roll(truth, lag), truth) for truth in truths]) == lag


def test_a_jaw_that_hardly_moves_does_not_speak() -> None:
    assert speaks(0.3 * curve())
    assert not speaks(0.01 * curve())


def test_a_mouth_without_correlation_has_no_lag() -> None:
    assert best_lag([(np.ones(60), curve())]) is None


def test_a_ratio_needs_a_moving_truth() -> None:
    assert ratio_metric([(1, 2), (2, 4)]).value == 0.5
    assert ratio_metric([(1, 0)]) == Metric(None, "the truth is still")


def test_edge_energy_is_in_grey_levels() -> None:
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    frames[:, :, ::2] = 10
    assert edge_energy(frames) == 10
    assert edge_energy(np.full((2, 8, 8, 3), 200, np.uint8)) == 0


def test_stillness_is_measured_within_the_mask() -> None:
    frames = np.zeros((9, 8, 8, 3), np.uint8)
    frames[::2, :4] = 255
    lower = np.zeros((8, 8), bool)
    lower[4:] = True
    assert stillness_db(frames, lower) == 99
    assert stillness_db(frames, ~lower) == pytest.approx(0, abs=0.1)


def test_the_background_mask_is_the_upper_corners() -> None:
    mask = corners(64, 80)
    assert mask[:16, :10].all()
    assert mask[:16, -10:].all()
    assert mask.sum() == 2 * 16 * 10


def test_blur_lowers_sharpness_and_smooth_motion_has_no_flicker() -> None:
    sharp = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    blurred = ((sharp.astype(int) + np.roll(sharp, 1, 1) + np.roll(sharp, 1, 2)) // 3).astype(np.uint8)
    assert sharpness(blurred) < 0.7 * sharpness(sharp)
    ramp = np.tile(np.arange(0, 90, 10, dtype=np.uint8)[:, None, None, None], (1, 4, 4, 3))
    assert flicker(ramp) == 0
    ramp[::2] += 5
    assert flicker(ramp) == 10


def test_distance_to_the_reference_is_in_grey_levels_and_ignores_detail() -> None:
    reference = np.full((64, 64, 3), 100, np.uint8)
    assert distance(np.stack([reference + 7] * 4), reference) == pytest.approx(7)
    detailed = reference.copy()
    detailed[::2, ::2], detailed[1::2, 1::2] = 110, 90
    assert distance(detailed[None], reference) == pytest.approx(0)


def test_distance_to_the_reference_ignores_where_a_head_is() -> None:
    reference = np.zeros((128, 128, 3), np.uint8)
    reference[32:96, 32:96] = (200, 150, 120)
    moved = np.roll(reference, 16, axis=1)
    assert distance(moved[None], reference) == pytest.approx(0)
    assert distance(moved[None] // 2, reference) > 30


def test_chance_is_the_correlation_of_shifted_curves() -> None:
    one = curve(300)
    chance = np.sqrt(np.mean([correlation(one, np.roll(one, shift)) ** 2 for shift in range(25, 276)]))
    assert ratio_to_chance([(one, one)]) == pytest.approx(1 / chance, rel=1e-6)
