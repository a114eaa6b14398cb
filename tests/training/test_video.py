from pathlib import Path

import numpy as np
import pytest
import torch

from avatar.media import write_mp4
from training.codec.crops import CropConfig, load_crops
from training.data import ClipShape, read_clips
from training.video import FIRST_FRAME, clips_of, convert, read_frames, split_of

SHAPE = ClipShape(num_frames=24, max_lead_frames=36, tail_frames=4)


@pytest.fixture
def film(tmp_path: Path) -> Path:
    """A film of four seconds, white and loud in frames 40 to 44, else black and silent."""
    frames = np.zeros((100, 64, 96, 3), np.uint8)
    frames[40:45] = 255
    audio = np.zeros((1, 4 * 48000), np.float32)
    audio[:, 40 * 1920 : 45 * 1920] = 0.5
    path = tmp_path / "films" / "flash.mp4"
    path.parent.mkdir()
    write_mp4(path, [frames], 25, 0, audio, 48000)
    return path


def test_frames_keep_their_times(film: Path) -> None:
    bright = [frame.mean() > 128 for frame in read_frames(film, (48, 32))]
    assert len(bright) == 100
    assert np.flatnonzero(bright).tolist() == list(range(40, 45))


def test_audio_matches_frames(film: Path) -> None:
    clips = list(clips_of(film, SHAPE, (48, 32)))
    assert len(clips) == (100 - FIRST_FRAME) // SHAPE.num_frames
    second = clips[1]
    lead = second.info["lead_frames"]
    assert lead == 36
    assert second.arrays["frames"].shape == (24, 32, 48, 3)
    bright = second.arrays["frames"].mean((1, 2, 3)) > 128
    loud = np.abs(second.arrays["sound"].reshape(-1, 640)[lead : lead + 24]).mean(1) > 3000
    assert np.flatnonzero(bright).tolist() == list(range(4, 9))
    np.testing.assert_array_equal(bright, loud)


def test_the_first_clip_has_the_audio_from_the_start_of_the_film(film: Path) -> None:
    assert [clip.info["lead_frames"] for clip in clips_of(film, SHAPE, (48, 32))] == [12, 36, 36]


def test_films_become_shards_that_training_reads(film: Path, tmp_path: Path) -> None:
    counts = convert(film.parent, tmp_path / "data", ClipShape(), (64, 64))
    assert counts == {"train": int(split_of(film) == "train"), "held_out": int(split_of(film) == "held_out")}
    clips = read_clips(tmp_path / "data", split_of(film))
    frames, weights = load_crops(clips, CropConfig(batch_size=1, size=32, num_frames=9), 0, 0)
    assert frames.shape == (1, 3, 9, 32, 32)
    assert torch.equal(weights, torch.ones_like(weights))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a film")
    with pytest.raises(ValueError, match=r"notes\.txt is not a film"):
        next(read_frames(tmp_path / "notes.txt", (32, 32)))
