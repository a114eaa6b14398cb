"""The reader of lids, on drawn eyes."""

from pathlib import Path
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.torch import save_file

from training.data import Clip, StoredClip, read_shard, write_shard
from training.eval.readers.blinks import CORNERS, BlinkReader, blink_metric, blink_rate, examples, train
from training.eval.readers.landmarks import NUM_POINTS, Landmarks

SIDE = 96
EYES = ((36, 30), (36, 66))
BLINKS = (10, 11, 12, 30, 31, 32)


def picture(closed: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw two eyes: a dark pupil in a bright eye, as high as the lids leave it open."""
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    frame = np.full((SIDE, SIDE, 3), 150.0) + rng.normal(0, 4, (SIDE, SIDE, 3))
    for row, column in EYES:
        height = 6 * (1 - closed)
        opened = (np.abs(x - column) < 11) & (np.abs(y - row) <= height)
        frame[opened] = 230
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
    closed = np.zeros(50, np.float32)
    closed[list(BLINKS)] = (0.6, 1.0, 0.7, 0.6, 1.0, 0.7)
    frames = np.stack([picture(float(each), rng) for each in closed])
    write_shard(folder / f"{number}.tar", [Clip(str(number), {"frames": frames, "blink": closed}, {})])
    return read_shard(folder / f"{number}.tar")[0]


def test_the_reader_learns_lids_from_their_truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.eval.readers.blinks.NUM_STEPS", 80)
    learnt, other = clip_of(tmp_path, 0), clip_of(tmp_path, 1)
    crops, truth = examples([learnt], LANDMARKS, np.random.default_rng(0))
    assert len(crops) == len(truth) == 2 * (6 + 12)
    save_file(train(crops, truth).state_dict(), tmp_path / "reader")
    reader, frames = BlinkReader.load(tmp_path / "reader"), other.frames()
    closed = reader.closed(frames, LANDMARKS.points(frames))
    assert np.corrcoef(closed, other.array("blink"))[0, 1] > 0.9
    assert blink_rate(closed) == pytest.approx(2 * 60 * 25 / 50)
    still = np.repeat(frames[:1], 50, axis=0)
    open_eyes = reader.closed(still, LANDMARKS.points(still))
    assert blink_rate(open_eyes) == 0
    assert blink_metric([(closed, closed), (open_eyes, closed)]).value == pytest.approx(0.5)
    nowhere = np.full((50, NUM_POINTS, 2), np.nan, np.float32)
    assert np.isnan(reader.closed(frames, nowhere)).all()


def test_a_missing_reader_says_how_to_train_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train it: python -m training\.eval\.readers\.blinks"):
        BlinkReader.load(tmp_path / "none")
    assert "--blink-reader" in blink_metric([]).note
