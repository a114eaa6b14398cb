from pathlib import Path

import numpy as np
import pytest

from tests.training.small import noisy_clip
from training.data import Clip, read_clips, write_shard
from training.prepare import prepare


def test_a_clip_gets_latents_features_and_a_mirrored_twin_once(checkpoint: Path, tmp_path: Path) -> None:
    clip = noisy_clip(0, 12)
    lips = np.tile(np.array((20, 10), np.float32), (24, 1))
    clip = Clip(clip.name, {**clip.arrays, "lips": lips}, clip.info)
    for split in ("train", "held_out"):
        write_shard(tmp_path / "data" / split / "0.tar", [clip])
    assert prepare(tmp_path / "data", tmp_path / "out", checkpoint) == 2
    assert prepare(tmp_path / "data", tmp_path / "out", checkpoint) == 0
    twin, plain = read_clips(tmp_path / "out", "train")
    for each in (plain, twin):
        assert each.array("latents").shape[1:] == (6, 8, 8)
        assert each.array("features").shape[-1] == 24
    assert twin.name == "0-mirrored"
    assert twin.array("lips")[0].tolist() == [20, 63 - 10]
    assert [each.name for each in read_clips(tmp_path / "out", "held_out")] == ["0"]


def test_a_folder_without_shards_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no shards in .*; make some"):
        prepare(tmp_path, tmp_path / "out", checkpoint)
