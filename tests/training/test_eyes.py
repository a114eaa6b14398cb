"""The reader of lids and brows, on drawn eyes."""

from pathlib import Path
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.torch import save_file

from training.data import Clip, StoredClip, read_shard, write_shard
from training.eval.behaviour import blink_rate
from training.eval.readers.eyes import CORNERS, EyeReader, examples, train
from training.eval.readers.landmarks import NUM_POINTS, Landmarks

SIDE = 96
EYES = ((36, 30), (36, 66))
BLINKS = (10, 11, 12, 30, 31, 32)


def picture(closed: float, raised: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw two eyes under dark brows: a dark pupil in a bright eye, as high as the lids leave it open."""
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    frame = np.full((SIDE, SIDE, 3), 150.0) + rng.normal(0, 4, (SIDE, SIDE, 3))
    for row, column in EYES:
        height = 6 * (1 - closed)
        opened = (np.abs(x - column) < 11) & (np.abs(y - row) <= height)
        frame[opened] = 230
        frame[(np.abs(x - column) < 11) & (np.abs(y - row + 14 + 6 * raised) < 2)] = 60
        frame[opened & (np.hypot(x - column, y - row) < 5)] = 40
    return np.clip(frame, 0, 255).astype(np.uint8)


class EyesInPlace:
    """Landmarks of the drawn eyes."""

    def points(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        points = np.zeros((len(frames), NUM_POINTS, 2), np.float32)
        for (outer, inner), (row, column), side in zip(CORNERS, EYES, (1, -1), strict=True):
            points[:, outer], points[:, inner] = (column - 11 * side, row), (column + 11 * side, row)
        return points


LANDMARKS = cast(Landmarks, EyesInPlace())


def clip_of(folder: Path, number: int) -> StoredClip:
    rng = np.random.default_rng(number)
    closed, raised = np.zeros((2, 50), np.float32)
    closed[list(BLINKS)] = (0.6, 1.0, 0.7, 0.6, 1.0, 0.7)
    raised[20:28] = raised[40:46] = 0.8
    lids_and_brows = zip(closed.tolist(), raised.tolist(), strict=True)
    frames = np.stack([picture(lid, brow, rng) for lid, brow in lids_and_brows])
    write_shard(folder / f"{number}.tar", [Clip(str(number), {"frames": frames, "blink": closed, "brow": raised}, {})])
    return read_shard(folder / f"{number}.tar")[0]


def test_the_reader_learns_lids_and_brows_from_their_truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.eval.readers.eyes.NUM_STEPS", 50)
    learnt, other = clip_of(tmp_path, 0), clip_of(tmp_path, 1)
    crops, truth = examples([learnt], LANDMARKS, np.random.default_rng(0))
    assert len(crops) == len(truth) == 2 * (6 + 8 + 8)
    save_file(train(crops, truth).state_dict(), tmp_path / "reader")
    reader, frames = EyeReader.load(tmp_path / "reader"), other.frames()
    lids, brow = reader.read(frames, LANDMARKS.points(frames))
    assert np.corrcoef(lids, other.array("blink"))[0, 1] > 0.9
    assert np.corrcoef(brow, other.array("brow"))[0, 1] > 0.9
    assert blink_rate(lids) == pytest.approx(2 * 60 * 25 / 50)
    still = np.repeat(frames[:1], 50, axis=0)
    lids, brow = reader.read(still, LANDMARKS.points(still))
    assert blink_rate(lids) == 0
    assert np.ptp(brow) < 0.01


def test_a_missing_reader_says_how_to_train_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train it: python -m training\.eval\.readers\.eyes"):
        EyeReader.load(tmp_path / "none")
