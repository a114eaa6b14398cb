from pathlib import Path

import numpy as np
import pytest
import torch

from avatar.media import write_mp4
from training.codec.crops import CropRule, batch_of
from training.data import ClipShape, read_clips
from training.video import FIRST_FRAME, clips_of, convert, part_of, pictures

SHAPE = ClipShape(frames=24, most_lead=36, tail=4)


@pytest.fixture
def film(tmp_path: Path) -> Path:
    """Four seconds whose picture is white, and whose sound is loud, in the frames from 40 to 44."""
    frames = np.zeros((100, 64, 96, 3), np.uint8)
    frames[40:45] = 255
    sound = np.zeros((1, 4 * 48000), np.float32)
    sound[:, 40 * 1920 : 45 * 1920] = 0.5
    path = tmp_path / "films" / "flash.mp4"
    path.parent.mkdir()
    write_mp4(path, [frames], 25, 0, sound, 48000)
    return path


def test_a_film_s_frames_keep_their_times(film: Path) -> None:
    bright = [picture.mean() > 128 for picture in pictures(film, (48, 32))]
    assert len(bright) == 100
    assert np.flatnonzero(bright).tolist() == list(range(40, 45))


def test_a_clip_s_sound_belongs_to_its_pictures(film: Path) -> None:
    clips = list(clips_of(film, SHAPE, (48, 32)))
    assert len(clips) == (100 - FIRST_FRAME) // SHAPE.frames
    second = clips[1]
    lead = second.info["lead_frames"]
    assert lead == 36
    assert second.arrays["frames"].shape == (24, 32, 48, 3)
    bright = second.arrays["frames"].mean((1, 2, 3)) > 128
    loud = np.abs(second.arrays["sound"].reshape(-1, 640)[lead : lead + 24]).mean(1) > 3000
    assert np.flatnonzero(bright).tolist() == list(range(4, 9))
    np.testing.assert_array_equal(bright, loud)


def test_the_first_clip_has_the_sound_since_the_film_s_start(film: Path) -> None:
    assert [clip.info["lead_frames"] for clip in clips_of(film, SHAPE, (48, 32))] == [12, 36, 36]


def test_films_become_shards_that_training_reads(film: Path, tmp_path: Path) -> None:
    found = convert(film.parent, tmp_path / "data", ClipShape(), (64, 64))
    assert found == {"train": int(part_of(film) == "train"), "held_out": int(part_of(film) == "held_out")}
    clips = read_clips(tmp_path / "data", part_of(film))
    frames, weights = batch_of(clips, CropRule(batch=1, size=32, num_frames=9), 0, 0)
    assert frames.shape == (1, 3, 9, 32, 32)
    assert torch.equal(weights, torch.ones_like(weights))


def test_another_file_is_no_film(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no film")
    with pytest.raises(ValueError, match=r"notes\.txt is not a film"):
        next(pictures(tmp_path / "notes.txt", (32, 32)))
