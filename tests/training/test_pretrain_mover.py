"""Tests of the mover's pretraining."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from avatar.checkpoints.files import save
from avatar.denoiser.model import Network
from avatar.types import FACE_MOTION
from avatar.vae.light import LightCodec
from tests.training.conftest import synthetic_clip
from tests.training.small import CODEC, small
from training.data import Clip, StoredClip, read_clips, write_shard
from training.initialise import initialise
from training.lora import make_trainable
from training.pretrain_mover import (
    MIRRORED,
    MoverPretraining,
    MoverRecipe,
    augment,
    make_network,
    mirror,
    read_frames,
)

RECIPE = MoverRecipe(steps=60, warmup=1, ema_decay=0.8, num_clips=4, num_frames=2)


def moving_clip(number: int) -> Clip:
    """A disc that moves up and down, as face motion says in its pitch; the reference shows it where pitch is 0."""
    clip = synthetic_clip(number, side=64)
    rows, columns = np.mgrid[0:64, 0:64]
    pitch = 0.1 * np.sin(np.arange(21) + number)

    def picture(shift: float) -> np.ndarray:
        disc = np.hypot(rows - 32 - shift, columns - 32) < 12
        return np.where(disc[..., None], 220, 40).astype(np.uint8).repeat(3, -1)

    arrays = {
        **clip.arrays,
        "frames": np.stack([picture(60 * each) for each in pitch]),
        "reference": picture(0),
        "pose": np.stack([pitch, 0 * pitch, 0 * pitch], 1).astype(np.float32),
        "reference_pose": np.zeros(3, np.float32),
        "blink": np.zeros(21, np.float32),
        "gaze": np.zeros((21, 2), np.float32),
        "brow": np.zeros(21, np.float32),
    }
    return Clip(clip.name, arrays, clip.info)


@pytest.fixture
def moving(tmp_path: Path) -> list[StoredClip]:
    write_shard(tmp_path / "train" / "000000.tar", [moving_clip(number) for number in range(4)])
    return read_clips(tmp_path, "train")


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A denoiser folder as the audio encoders' pretraining writes it."""
    network = audio_network()
    save(tmp_path / "audio", network.config.to_dict(), network)
    return tmp_path / "audio"


def audio_network() -> Network:
    network = Network(small())
    initialise(network, 1)
    torch.nn.init.normal_(network.mouth.weight, generator=torch.Generator().manual_seed(2))
    return network


def codec() -> LightCodec:
    torch.manual_seed(3)
    return LightCodec(CODEC)


def test_the_mover_learns_where_the_head_is_and_other_weights_stay(moving: list[StoredClip], start: Path) -> None:
    run = MoverPretraining(RECIPE, lambda: make_network(start, codec()))
    before = run.validate(moving)
    assert before["psnr"] == pytest.approx(before["psnr_still"])
    for _ in range(RECIPE.steps):
        run.advance(moving)
    assert run.validate(moving)["psnr"] > before["psnr"] + 2
    first, after = make_network(start, codec()).state_dict(), run.network.network.state_dict()
    changed = {name for name in first if not torch.equal(first[name], after[name])}
    assert changed
    assert all(name.startswith("mover.") and not name.startswith("mover.codec") for name in changed)
    assert len(run.preview(moving)) == 2 * 4


def test_a_network_gets_the_codec_and_keeps_its_other_weights(start: Path) -> None:
    network, before = make_network(start, codec()), audio_network()
    assert network.config.mover == CODEC
    for name, weight in codec().state_dict().items():
        assert torch.equal(network.mover.codec.state_dict()[name], weight)
    assert torch.equal(network.mouth.weight, before.mouth.weight)


def test_frames_have_the_values_of_their_moments(moving: list[StoredClip]) -> None:
    clip = moving[1]
    frames = read_frames(clip, [3, 17])
    assert frames.pictures.shape == (1, 3, 2, 32, 32)
    assert frames.references.shape == (1, 3, 64, 64)
    torch.testing.assert_close(frames.values[0, 1], torch.from_numpy(np.array(clip.array("pose")[[3, 17], 0])))
    torch.testing.assert_close(frames.values[0, -2], torch.from_numpy(np.array(clip.array("jaw")[[3, 17]])))


def test_frames_with_raised_brows_are_drawn_more_often(moving: list[StoredClip], start: Path, tmp_path: Path) -> None:
    brow = (np.arange(21) == 3).astype(np.float32)
    rising = Clip("rising", {**moving_clip(0).arrays, "brow": brow}, moving_clip(0).info)
    write_shard(tmp_path / "rising" / "train" / "0.tar", [rising])
    counts = []
    for clips in (moving, read_clips(tmp_path / "rising", "train")):
        run = MoverPretraining(replace(RECIPE, num_clips=60, num_frames=1), lambda: make_network(start, codec()))
        # The jaw is the seventh of the values and tells the frames apart.
        jaw = float(np.array(clips[0].array("jaw"))[3])
        counts.append(int((run.draw(clips[:1]).values[:, 6, 0] == jaw).sum()))
    usual, raised = counts
    assert raised > 2 * max(usual, 1)


def test_errors_at_brows_count_more_than_beside_them(tmp_path: Path) -> None:
    arrays = {**moving_clip(0).arrays, "lips": np.tile(np.array((44, 32), np.float32), (21, 1))}
    arrays["pose"] = np.zeros((21, 3), np.float32)
    write_shard(tmp_path / "train" / "0.tar", [Clip("0", arrays, moving_clip(0).info)])
    [clip] = read_clips(tmp_path, "train")
    weights = read_frames(clip, [0], lips_gain=8.0).weights[0, 0, 0]
    # Pictures of 32 rows: lips at 22 and 16, eyes 8.4 rows above and 4 columns aside, brows 2.3 rows above the eyes.
    rows = weights[:, 12]
    assert rows[11] > 3 * rows[5]
    assert weights[11, 12] > 3 * weights[11, 28]


def test_a_mirrored_head_turns_to_the_other_side(moving: list[StoredClip]) -> None:
    frames = read_frames(moving[1], [3, 17], lips_gain=5.0)
    other = mirror(frames)
    for name in ("pictures", "references", "weights"):
        assert torch.equal(getattr(other, name).flip(-1), getattr(frames, name))
    turned = {name for name, sign in zip((*FACE_MOTION, "jaw", "brow"), MIRRORED, strict=True) if sign < 0}
    assert turned == {"yaw", "roll", "gaze_right"}
    assert torch.equal(other.values[:, 1], frames.values[:, 1])
    assert torch.equal(mirror(other).values, frames.values)


def test_a_clip_is_recoloured_with_its_reference(moving: list[StoredClip]) -> None:
    frames = read_frames(moving[1], [3, 17])
    seen = [augment(frames, np.random.default_rng(seed)) for seed in range(16)]
    for each in seen:
        # The disc and the ground are the same two colours in pictures and in the reference.
        assert each.pictures.amax((0, 2, 3, 4)) == pytest.approx(each.references.amax((0, 2, 3)))
        assert each.pictures.amin((0, 2, 3, 4)) == pytest.approx(each.references.amin((0, 2, 3)))
        assert not torch.equal(each.references, frames.references)


def test_a_network_without_a_mover_is_refused() -> None:
    with pytest.raises(ValueError, match="the network has no mover"):
        MoverPretraining(RECIPE, lambda: Network(replace(small(), mover=None)))


def test_later_stages_keep_what_was_pretrained() -> None:
    network = make_trainable(Network(small()), None, 0)
    kept = ("mover.", "mouth.", "brows.", "casual_audio_encoder.", "heard_audio_encoder.")
    for name, weight in network.named_parameters():
        assert weight.requires_grad != name.startswith(kept), name
