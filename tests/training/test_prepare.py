from pathlib import Path

import numpy as np
import pytest
import torch

from avatar.audio.model import load as load_audio
from avatar.checkpoints.layouts import open_part
from avatar.types import AudioPiece, Session
from tests.training.small import noisy_clip
from training.codec.crops import recolour
from training.data import Clip, read_clips, read_shard, write_shard
from training.prepare import Encoders, audio_of, mirror, prepare, shrink, truth_of


def test_a_clip_gets_latents_features_and_a_mirrored_twin_once(checkpoint: Path, tmp_path: Path) -> None:
    clip = noisy_clip(0, 12)
    lips = np.tile(np.array((20, 10), np.float32), (24, 1))
    clip = Clip(clip.name, {**clip.arrays, "lips": lips}, clip.info)
    for split in ("train", "held_out"):
        write_shard(tmp_path / "data" / split / "0.tar", [clip])
    assert prepare(tmp_path / "data", tmp_path / "out", Encoders(checkpoint)) == 2
    assert prepare(tmp_path / "data", tmp_path / "out", Encoders(checkpoint)) == 0
    twin, plain = read_clips(tmp_path / "out", "train")
    for each in (plain, twin):
        assert each.array("latents").shape[1:] == (6, 8, 8)
        assert each.array("features").shape[-1] == 24
    assert twin.name == "0-mirrored"
    assert twin.array("lips")[0].tolist() == [20, 63 - 10]
    assert [each.name for each in read_clips(tmp_path / "out", "held_out")] == ["0"]


def test_features_of_shorter_blocks_are_those_of_a_stream_of_them(
    checkpoint: Path, short_blocks: Path, tmp_path: Path
) -> None:
    write_shard(tmp_path / "data/held_out/0.tar", [noisy_clip(0, 4)])
    with pytest.raises(ValueError, match="starts after 4 frames of audio, expected whole blocks of 12"):
        prepare(tmp_path / "data", tmp_path / "long", Encoders(checkpoint))
    prepare(tmp_path / "data", tmp_path / "short", Encoders(short_blocks))
    [clip], [prepared] = (read_clips(tmp_path / name, "held_out") for name in ("data", "short"))
    assert prepared.array("latents").shape[1:] == (6, 8, 8)
    audio = load_audio(open_part(short_blocks, "audio"))
    piece = AudioPiece(torch.from_numpy(audio_of(clip))[None], 16000)
    blocks = audio.step(piece, audio.open(Session("", 0, torch.empty(0))))[1:7]
    expected = torch.cat([block.features for block in blocks], dim=-1).half().numpy()
    np.testing.assert_array_equal(prepared.array("features"), expected)


def test_the_others_audio_is_encoded_unless_it_was_dropped(checkpoint: Path, tmp_path: Path) -> None:
    clip = noisy_clip(0, 12)
    other = np.random.default_rng(1).integers(-9999, 9999, len(clip.arrays["sound"]), np.int16)
    arrays = {**clip.arrays, "other": other}
    kinds = {"0": {}, "1": {"other_is_dropped": True}}
    clips = [Clip(name, arrays, {**clip.info, **extra}) for name, extra in kinds.items()]
    early = Clip("2", {**arrays, "other": np.where(np.arange(len(other)) < 24 * 640, other, 0)}, clip.info)
    write_shard(tmp_path / "data" / "held_out" / "0.tar", [*clips, early])
    prepare(tmp_path / "data", tmp_path / "out", Encoders(checkpoint))
    heard, dropped, cut = read_clips(tmp_path / "out", "held_out")
    assert heard.array("heard").shape == heard.array("features").shape
    assert not dropped.has("heard")
    np.testing.assert_array_equal(heard.array("features"), dropped.array("features"))
    # Nothing behind a block's end is heard: the clip's first block ends with frame 24 of the audio.
    np.testing.assert_array_equal(heard.array("heard")[..., :12], cut.array("heard")[..., :12])
    assert not np.array_equal(heard.array("heard")[..., 12:], cut.array("heard")[..., 12:])


def test_features_can_be_encoded_for_shorter_blocks(checkpoint: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "data" / "held_out" / "0.tar", [noisy_clip(0, 12)])
    for latents in (3, 1):
        prepare(tmp_path / "data", tmp_path / str(latents), Encoders(checkpoint, block_latents=latents))
    long, short = (read_clips(tmp_path / str(latents), "held_out")[0] for latents in (3, 1))
    np.testing.assert_array_equal(long.array("latents"), short.array("latents"))
    assert long.array("features").shape == short.array("features").shape
    assert not np.array_equal(long.array("features"), short.array("features"))


def test_a_folder_without_shards_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no shards in .*; make some"):
        prepare(tmp_path, tmp_path / "out", Encoders(checkpoint))


def test_frames_and_truth_are_averaged_down_together(tmp_path: Path) -> None:
    frames = np.zeros((1, 4, 4, 3), np.uint8)
    frames[0, 2:, :2] = 200
    np.testing.assert_array_equal(shrink(frames, 2)[0, :, :, 0], [[0, 0], [200, 0]])
    lips, gap = np.array([(3.0, 1.0)], np.float32), np.array([8.0], np.float32)
    write_shard(tmp_path / "0.tar", [Clip("0", {"lips": lips, "gap": gap, "nod": np.ones(1)}, {})])
    [clip] = read_shard(tmp_path / "0.tar")
    small = truth_of(clip, 2)
    assert {name: array.tolist() for name, array in small.items()} == {"lips": [[1.5, 0.5]], "gap": [4.0], "nod": [1.0]}


def test_a_mirrored_head_turns_and_looks_the_other_way() -> None:
    truth = {
        "pose": np.array([(0.1, 0.2, 0.3)]),
        "reference_pose": np.array((0.3, 0.2, 0.1)),
        "gaze": np.array([(0.4, 0.5)]),
        "blink": np.array([0.6]),
    }
    mirrored = {name: array.tolist() for name, array in mirror(truth, 64).items()}
    assert mirrored == {
        "pose": [[0.1, -0.2, -0.3]],
        "reference_pose": [0.3, -0.2, -0.1],
        "gaze": [[-0.4, 0.5]],
        "blink": [0.6],
    }


def test_recoloured_people_keep_the_order_of_their_channels() -> None:
    pixels = torch.tensor((0.6, 0.0, -0.6)).reshape(3, 1, 1, 1).expand(3, 2, 4, 4)
    for seed in range(60):
        red, green, blue = recolour(pixels, np.random.default_rng(seed))[:, 0, 0, 0].tolist()
        assert red > green > blue
