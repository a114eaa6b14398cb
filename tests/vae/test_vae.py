"""Tests of avatar.vae.vae, with either codec."""

import dataclasses
import weakref
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from avatar.checkpoints.files import save
from avatar.checkpoints.part import Part
from avatar.types import MOTION_LATENTS, Block, LatentFrame, Session
from avatar.vae.picture.rule import PictureRule
from avatar.vae.vae import MOTION_FRAMES, WARMUP_LATENTS, Vae, VaeConfig, VaeState, load, tiny
from tests.vae.conftest import BLOCKS_OF_1, LIGHT, SIZE, WAN, blocks, light_codec, session, wan_codec, with_short_blocks


def play(vae: Vae[Any], opened: Session, items: list[Block]) -> Tensor:
    """Return the bytes of a whole stream."""
    state = vae.open(opened)
    return torch.cat([decoded(vae, block, state) for block in items])


def decoded(vae: Vae[Any], block: Block, state: VaeState[Any]) -> Tensor:
    """Return the bytes of a block."""
    return torch.cat([chunk.frames for chunk in vae.decode(block, state)])


def values_of(vae: Vae[Any], block: Block, state: VaeState[Any]) -> Tensor:
    """Return the frames of a block in [-1, 1]."""
    return torch.cat([vae.frames(latent, state) for latent in vae.latent_frames(block)], dim=1)


@with_short_blocks
def test_streamed_equals_whole(vae: Vae[Any]) -> None:
    state, items = vae.open(session()), blocks(4, 0, vae.block_latents)
    streamed = torch.cat([values_of(vae, block, state) for block in items], dim=1)
    parts = [session().motion[:, :WARMUP_LATENTS], *(block.latent for block in items if block.latent is not None)]
    with torch.inference_mode():
        whole = vae.codec.decode(torch.cat(parts, dim=1)[None], vae.codec.new_state())[0].clamp(-1, 1)
    assert 0.1 < whole.std() < 0.9
    torch.testing.assert_close(streamed, whole[:, -streamed.shape[1] :], rtol=0, atol=1e-5)


@with_short_blocks
def test_interleaved_equals_alone(vae: Vae[Any]) -> None:
    states = [vae.open(session(seed)) for seed in (0, 1)]
    chunks: list[list[Tensor]] = [[], []]
    for items in zip(
        blocks(3, 0, vae.block_latents),
        blocks(3, 1, vae.block_latents),
        strict=True,
    ):
        for block, state, shown in zip(items, states, chunks, strict=True):
            shown.append(decoded(vae, block, state))
        if items[0].index == 0:
            vae.encode_picture(torch.zeros(SIZE[1], SIZE[0], 3, dtype=torch.uint8))
    for seed, shown in enumerate(chunks):
        assert torch.equal(torch.cat(shown), play(vae, session(seed), blocks(3, seed, vae.block_latents)))


@with_short_blocks
def test_closing_a_stream_frees_state(vae: Vae[Any]) -> None:
    state = vae.open(session())
    decoded(vae, blocks(1, 0, vae.block_latents)[0], state)
    slots = state.decoder if isinstance(state.decoder, list) else [*vars(state.decoder)["_last"].values()]
    kept: list[weakref.ref[Any]] = [weakref.ref(slot) for slot in slots if isinstance(slot, Tensor)]
    assert kept
    del state, slots
    assert {reference() for reference in kept} == {None}


@with_short_blocks
def test_past_blocks_rebuild_the_state_exactly(vae: Vae[Any]) -> None:
    items = blocks(vae.history_blocks + 2, 0, vae.block_latents)
    known = play(vae, session(), items)[-vae.block_frames :]
    # Another session's picture: what came before the replayed blocks must not matter.
    state = vae.open(session(seed=5))
    for block in items[-1 - vae.history_blocks : -1]:
        decoded(vae, block, state)
    assert torch.equal(decoded(vae, items[-1], state), known)


def test_history_is_not_longer_than_needed(vae: Vae[Any]) -> None:
    codec = vae.codec
    latents = torch.randn(codec.history + 8, 1, 16, 1, 2, 3, generator=torch.Generator().manual_seed(0))

    def last_frames(others: int, past: int) -> Tensor:
        state = codec.new_state()
        for latent in (*torch.ones(others, 1, 16, 1, 2, 3), *latents[-1 - past :]):
            frames = codec.decode(latent, state)
        return frames

    with torch.inference_mode():
        known = last_frames(0, len(latents) - 1)
        assert torch.equal(last_frames(7, codec.history), known)
        assert not torch.equal(last_frames(7, codec.history - 1), known)


def test_the_first_latent_frame_gives_frame_three_and_every_other_four_frames(vae: Vae[Any]) -> None:
    state = vae.open(session())
    items = [dataclasses.replace(block, traceparent="trace") for block in blocks(2)]
    chunks = [chunk for block in items for chunk in vae.decode(block, state)]
    assert [(chunk.block, chunk.first_frame, len(chunk.frames), chunk.is_last) for chunk in chunks] == [
        (0, 3, 1, False),
        (0, 4, 4, False),
        (0, 8, 4, True),
        (1, 12, 4, False),
        (1, 16, 4, False),
        (1, 20, 4, True),
    ]
    assert chunks[0].frames.shape[1:] == (SIZE[1], SIZE[0], 3)
    assert chunks[0].frames.dtype == torch.uint8
    assert chunks[0].traceparent == "trace"


@pytest.mark.parametrize("vae", BLOCKS_OF_1, indirect=True, ids="{0[0]}".format)
def test_blocks_of_one_latent_give_the_same_bytes(vae: Vae[Any]) -> None:
    [long] = blocks(1)
    assert long.latent is not None
    short = [Block(index, torch.empty(0), latent) for index, latent in enumerate(torch.split(long.latent, 1, dim=1))]
    state = vae.open(session())
    chunks = [chunk for block in short for chunk in vae.decode(block, state)]
    assert [(chunk.block, chunk.first_frame, chunk.is_last) for chunk in chunks] == [
        (0, 3, True),
        (1, 4, True),
        (2, 8, True),
    ]
    whole = play(Vae(vae.codec, vae.config, block_latents=3), session(), [long])
    assert torch.equal(torch.cat([chunk.frames for chunk in chunks]), whole)


def test_a_rebuilt_stream_counts_frames_from_its_first_block(vae: Vae[Any]) -> None:
    block = dataclasses.replace(blocks(1)[0], index=7)
    chunks = vae.decode(block, vae.open(session()))
    assert [(chunk.first_frame, len(chunk.frames)) for chunk in chunks] == [(84, 4), (88, 4), (92, 4)]


def test_a_later_latent_frame_is_due_its_duration_before_its_frames_are(vae: Vae[Any]) -> None:
    block = dataclasses.replace(blocks(1)[0], due_s=10.0)
    assert [latent.due_s for latent in vae.latent_frames(block)] == pytest.approx([10.0, 10.0, 10.16])


def test_the_first_block_continues_the_still_picture(vae: Vae[Any]) -> None:
    first = blocks(1)
    changed = session().motion.clone()
    changed[:, 6] += 1
    assert not torch.equal(play(vae, session(), first), play(vae, Session("changed", 0, changed), first))
    # Later motion latents are for the network only.
    changed = session().motion.clone()
    changed[:, 7:] += 1
    assert torch.equal(play(vae, session(), first), play(vae, Session("changed", 0, changed), first))


def test_bytes_are_truncated_not_rounded(vae: Vae[Any]) -> None:
    block = blocks(1)[0]
    values = values_of(vae, block, vae.open(session()))
    shown = decoded(vae, block, vae.open(session()))
    assert torch.equal(shown.permute(3, 0, 1, 2), ((values + 1) * 127.5).floor().to(torch.uint8))


def test_blocks_out_of_order_are_refused(vae: Vae[Any]) -> None:
    state = vae.open(session())
    items = blocks(3)
    decoded(vae, items[0], state)
    for block in (items[0], items[2]):
        with pytest.raises(ValueError, match=f"of block {block.index}, is out of order, expected latent frame 3"):
            decoded(vae, block, state)
    # A refused block leaves the stream as it was.
    assert torch.equal(decoded(vae, items[1], state), play(vae, session(), items[:2])[-12:])


@pytest.mark.parametrize("shape", [None, (16, 2, 2, 3), (1, 16, 3, 2, 3)])
def test_latents_that_are_not_those_of_a_block_are_refused(vae: Vae[Any], shape: tuple[int, ...] | None) -> None:
    block = Block(0, torch.empty(0), None if shape is None else torch.zeros(shape))
    with pytest.raises(ValueError, match=r"must have a latent of shape \(16, 3, h, w\), got"):
        list(vae.latent_frames(block))


@pytest.mark.parametrize("shape", [(16, 1, 3, 2), (8, 1, 2, 3), (16, 2, 2, 3), (1, 16, 1, 2, 3)])
def test_latents_of_another_shape_are_refused(vae: Vae[Any], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must have the shape \(16, 1, 2, 3\), got"):
        vae.step(LatentFrame(0, torch.zeros(shape), 0, is_last=False), vae.open(session()))


@pytest.mark.parametrize("shape", [(16, 18, 2, 3), (8, 19, 2, 3), (1, 16, 19, 2, 3)])
def test_motion_latents_of_another_shape_are_refused(vae: Vae[Any], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must have the shape \(16, 19, h, w\)"):
        vae.open(Session("session", 0, torch.zeros(shape)))


def test_a_picture_becomes_the_latents_of_a_still_video(vae: Vae[Any]) -> None:
    rgb = torch.randint(256, (SIZE[1], SIZE[0], 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    motion = vae.encode_picture(rgb)
    assert motion.shape == (16, MOTION_LATENTS, 2, 3)
    assert motion.dtype == torch.float32
    pixels = rgb.permute(2, 0, 1)[None, :, None] / 255 * 2 - 1
    with torch.inference_mode():
        reference = vae.codec.encode(pixels)
        still = vae.codec.encode(pixels.expand(-1, -1, MOTION_FRAMES, -1, -1))
    torch.testing.assert_close(motion[None, :, :1], reference, rtol=0, atol=1e-5)
    assert torch.equal(motion[None], still)


def test_pictures_that_do_not_fit_the_codec_are_refused(vae: Vae[Any]) -> None:
    with pytest.raises(ValueError, match="multiples of 8, got 24x20"):
        vae.encode_picture(torch.zeros(20, 24, 3, dtype=torch.uint8))
    for wrong in (torch.zeros(16, 24, 3), torch.zeros(3, 16, 24, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"must be \(h, w, 3\) uint8"):
            vae.encode_picture(wrong)


def test_a_saved_checkpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    light, wan = light_codec(), wan_codec()
    rule = PictureRule("reference", area=720 * 400)
    for codec, config, module in (
        (light, VaeConfig("light", rule, 25, dataclasses.asdict(LIGHT)), light),
        (wan, VaeConfig("wan", rule, 25, dataclasses.asdict(WAN)), wan.network),
    ):
        save(tmp_path / config.codec, dataclasses.asdict(config), module)
        loaded = load(Part.read(tmp_path / config.codec))
        assert loaded.config.picture == rule
        own: Vae[Any] = Vae(codec, config)
        assert torch.equal(play(loaded, session(), blocks(2)), play(own, session(), blocks(2)))


def test_unknown_fields_of_a_config_are_ignored_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rule = PictureRule("cover", width=SIZE[0], height=SIZE[1])
    config = dataclasses.asdict(VaeConfig("light", rule, 25, dataclasses.asdict(LIGHT)))
    config["colour"] = config["network"]["depth"] = config["picture"]["shape"] = 3
    save(tmp_path, config, light_codec())
    assert load(Part.read(tmp_path)).config.picture == rule
    for name in ("colour; known are codec, picture", "network.depth; known are wide", "picture.shape; known are fit"):
        assert f"ignored unknown fields of a checkpoint: {name}" in caplog.text


CHECK = {"mean": [0.0] * 32, "root": [0.0] * 528, "limit": 1.0, "notice": "unlike"}


def test_invalid_configs_are_refused(tmp_path: Path) -> None:
    good = dataclasses.asdict(tiny())
    network = good["network"]
    for change, words in (
        ({"codec": "jpeg"}, "codec must be one of light, wan, got 'jpeg'"),
        ({"network": {**network, "wide": 0}}, "network.wide must be 1 to 16384, got 0"),
        ({"network": {**network, "wide": 1 << 14}}, "do not fit LightCodec"),
        ({"network": {**network, "latent_scale": nan}}, "network.latent_scale must be a finite number, got nan"),
        ({"network": {**network, "scale": 10**9}}, "network.scale must be 1 to 64, got 1000000000"),
        ({"codec": "wan", "network": {"base_dim": -1}}, "network.base_dim must be 1 to 16384, got -1"),
        ({"codec": "wan", "network": {"dim_mult": 3}}, "network.dim_mult must be a list"),
        ({"codec": "wan", "network": {"latents_std": [0.0] * 16}}, "network.latents_std must be 1e-06 to"),
        ({"codec": "wan", "network": {"dim_mult": [1] * 64}}, "network.dim_mult must have at most 7 numbers"),
        ({"frame_rate_hz": 0}, "config.json: frame_rate_hz must be 1 to 1000, got 0"),
        ({"picture": {**good["picture"], "width": 10**12}}, "picture.width must be 1 to 8192"),
        ({"picture": {**good["picture"], "width": 100}}, "picture's sizes must be multiples of 8, got 100x128"),
        ({"picture": {"fit": "cover", "area": 100}}, "picture.area must be 8192 to"),
        ({"picture": {"fit": "cover", "area": 10000, "sizes": 3}}, "picture.sizes must be a list"),
        ({"familiar": {**CHECK, "mean": [0.0], "root": [1.0]}}, "familiar.mean must have 32 numbers, got 1"),
        ({"familiar": {**CHECK, "limit": -1}}, "familiar.limit must be 0.0 to"),
        ({"familiar": {**CHECK, "root": ["1"]}}, "familiar.root must be a list"),
        ({"network": {**network, "wide": 64}}, "do not fit LightCodec"),
        ({"picture": {"fit": "cover"}}, "either width and height or an area"),
        ({"frame_rate_hz": "25"}, "frame_rate_hz must be a whole number, got '25'"),
        ({"picture": {**good["picture"], "width": True}}, r"picture\.width must be a whole number or null, got True"),
        ({"picture": None}, "picture must be an object with fields, got None"),
    ):
        save(tmp_path, {**good, **change}, light_codec())
        with pytest.raises(ValueError, match=words):
            load(Part.read(tmp_path))
