from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from avatar.denoiser import model as denoiser_model
from training import evaluate, rollouts
from training.data import Clip, StoredClip, read_shard, write_shard
from training.figures import best_lag, correlation, edge_energy, ratio, stillness_db
from training.landmarks import mouth_opening
from training.takes import sound_of, take_of


def curve(num_frames: int = 60, seed: int = 0) -> NDArray[np.float64]:
    """A mouth's: smooth noise."""
    return np.convolve(np.random.default_rng(seed).normal(size=num_frames + 4), np.ones(5) / 5, "valid")


@pytest.fixture
def clips(tmp_path: Path) -> list[StoredClip]:
    """Two noisy clips of 24 frames at 64x64, with and without sound before the pictures."""
    rng = np.random.default_rng(0)

    def clip(number: int, lead_frames: int) -> Clip:
        arrays: dict[str, NDArray[Any]] = {
            "frames": rng.integers(0, 256, (24, 64, 64, 3), np.uint8),
            "reference": rng.integers(0, 256, (64, 64, 3), np.uint8),
            "sound": rng.integers(-9999, 9999, (lead_frames + 24 + 16) * 640, np.int16),
            "jaw": np.arange(24, dtype=np.float32),
        }
        return Clip(str(number), arrays, {"lead_frames": lead_frames})

    write_shard(tmp_path / "0.tar", [clip(0, 0), clip(1, 12)])
    return read_shard(tmp_path / "0.tar")


def test_truth_agrees_with_itself() -> None:
    assert correlation(curve(), curve()) == pytest.approx(1)
    assert abs(correlation(curve(400), curve(400, seed=1))) < 0.3


def test_a_still_curve_agrees_with_nothing() -> None:
    assert correlation(np.ones(60), curve()) == 0


@pytest.mark.parametrize("lag", [-3, 0, 2])
def test_a_late_mouth_has_a_positive_lag(lag: int) -> None:
    truths = [curve(seed=seed) for seed in range(3)]
    assert best_lag([(np.roll(truth, lag), truth) for truth in truths]) == lag


def test_a_mouth_that_never_agrees_has_no_lag() -> None:
    assert best_lag([(np.ones(60), curve())]) is None


def test_a_ratio_needs_a_truth() -> None:
    assert ratio([1, 2], [2, 4]) == 0.5
    assert ratio([1], [0]) is None


def test_edges_are_counted_in_grey_levels() -> None:
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    frames[:, :, ::2] = 10
    assert edge_energy(frames) == 10
    assert edge_energy(np.full((2, 8, 8, 3), 200, np.uint8)) == 0


def test_stillness_is_of_the_places_that_are_asked_for() -> None:
    frames = np.zeros((9, 8, 8, 3), np.uint8)
    frames[::2, :4] = 255
    left = np.zeros((8, 8), bool)
    left[4:] = True
    assert stillness_db(frames, left) == 99
    assert stillness_db(frames, ~left) == pytest.approx(0, abs=0.1)


def test_frames_are_compared_with_those_of_their_own_time(checkpoint: Path, clips: list[StoredClip]) -> None:
    """A stream's first three frames are hidden, and sound before the pictures is heard."""
    models = rollouts.load(checkpoint)
    start, later = (take_of(models, clip) for clip in clips)
    assert len(start.made) == len(start.truth) == 21
    np.testing.assert_array_equal(start.truth[0], clips[0].array("frames")[3])
    assert len(later.made) == len(later.truth) == 24
    assert later.rollout.num_blocks == 3
    whole = rollouts.spoken(rollouts.Rollout(models, later.reference), sound_of(clips[1]), 3)
    np.testing.assert_array_equal(later.made, whole[12 - 3 :])
    assert later.jaw is not None
    assert start.jaw is not None
    assert start.jaw[0] == 3


def test_a_network_in_training_is_looked_at_in_place_of_the_checkpoint_s(
    checkpoint: Path, clips: list[StoredClip], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.evaluate.Landmarks", NoFaces)
    network, config = denoiser_model.load(checkpoint / "denoiser")
    same = evaluate.quick(checkpoint, clips, (network, config))
    assert same == evaluate.quick(checkpoint, clips)
    assert same["lip_sync_r"] is None
    assert same["edge_energy"] is not None
    for parameter in network.parameters():
        parameter.zero_()
    assert evaluate.quick(checkpoint, clips, (network, config)) != same


class NoFaces:
    """Landmarks that find nobody."""

    def points(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.full((len(frames), 468, 2), np.nan, np.float32)


def face(openings: NDArray[np.floating]) -> NDArray[np.float32]:
    """Mesh points of which only lips and eyes are anywhere: eyes 20 apart."""
    points = np.zeros((len(openings), 468, 2), np.float32)
    points[:, 263, 0] = 20
    points[:, 17, 1] = openings
    return points


def test_a_mouth_is_measured_in_distances_between_the_eyes() -> None:
    np.testing.assert_allclose(mouth_opening(face(np.array([0, 5, 10]))), [0, 0.25, 0.5])


def test_a_frame_without_a_face_lies_between_its_neighbours() -> None:
    points = face(np.array([2, 50, 6, 6]))
    points[1] = np.nan
    np.testing.assert_allclose(mouth_opening(points), [0.1, 0.2, 0.3, 0.3], rtol=1e-6)
    points[2:] = np.nan
    assert np.isnan(mouth_opening(points)).all()
