import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from tests.training.conftest import synthetic_clip
from training.data import Clip, SplitFolder, StoredClip, encode_jpeg, read_clips, read_shard, write_shard


def test_a_clip_is_read_as_it_was_written(clips: list[StoredClip]) -> None:
    for number, stored in enumerate(clips):
        clip = synthetic_clip(number)
        assert (stored.name, stored.info) == (clip.name, clip.info)
        for name, array in clip.arrays.items():
            assert stored.array(name).dtype == array.dtype
            np.testing.assert_array_equal(stored.array(name), array)


def test_shards_of_the_same_clips_have_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shard(tmp_path / f"{name}.tar", [synthetic_clip(3)])
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_a_failed_write_leaves_no_shard(data: Path) -> None:
    def failing() -> object:
        yield synthetic_clip(7)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_shard(data / "train" / "000001.tar", failing())  # type: ignore[arg-type]
    assert len(read_clips(data, "train")) == 6


def test_clips_are_in_the_order_of_their_shards(data: Path) -> None:
    write_shard(data / "train" / "000001.tar", [synthetic_clip(6)])
    assert [clip.info["person"] for clip in read_clips(data, "train")] == list(range(7))


def test_an_unknown_array_is_named(clips: list[StoredClip]) -> None:
    with pytest.raises(ValueError, match="has no 'depth', only frames, lips, jaw"):
        clips[0].array("depth")


def test_an_empty_folder_names_the_program_that_fills_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"python -m training\.make_data"):
        read_clips(tmp_path, "train")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"not a tar file" * 100)
    with pytest.raises(ValueError, match="is not a shard of clips"):
        read_shard(tmp_path / "x.tar")


def test_frames_are_read_from_jpegs_in_any_span(tmp_path: Path) -> None:
    rows, columns = np.mgrid[0:32, 0:48]
    frames = [np.stack([rows * 4, columns * 3, rows + 9 * index], 2).astype(np.uint8) for index in range(7)]
    write_shard(tmp_path / "0.tar", [Clip("0", {}, {}, [encode_jpeg(frame) for frame in frames])])
    [clip] = read_shard(tmp_path / "0.tar")
    assert clip.num_frames == 7
    for span in (slice(None), slice(2, 5), slice(-3, None)):
        read = clip.frames(span)
        assert read.shape == (len(frames[span]), 32, 48, 3)
        assert np.abs(read.astype(int) - np.stack(frames[span])).mean() < 1


def test_frames_are_read_from_an_array_too(clips: list[StoredClip]) -> None:
    np.testing.assert_array_equal(clips[0].frames(slice(3, 6)), clips[0].array("frames")[3:6])
    assert clips[0].num_frames == len(clips[0].array("frames"))


def test_shards_that_arrive_are_read_and_old_ones_not_again(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = SplitFolder(data, "train")
    first = folder.add(folder.read_new())
    assert len(first) == 6
    read = Mock(side_effect=read_shard)
    monkeypatch.setattr("training.data.read_shard", read)
    assert [clip.name for clip in folder.add(folder.read_new())] == [clip.name for clip in first]
    assert not read.called
    shutil.copy(data / "held_out" / "000000.tar", data / "train" / "000000-mirrored.tar")
    names = [clip.name for clip in folder.add(folder.read_new())]
    assert read.call_count == 1
    assert names == [clip.name for clip in read_clips(data, "train")]
    assert len(names) == 8
