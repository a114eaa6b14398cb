"""Tests of a checkpoint in the published layout: served by the suite, and rendered."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from avatar.checkpoints.layouts import open_part
from avatar.checkpoints.lora import LoraAdapter
from avatar.render import RenderOptions, load, render
from avatar.runtime.device_queue import DeviceQueue
from avatar.settings import DenoiserSettings, GatewaySettings
from avatar.store.sessions import SessionStore
from avatar.text.model import load as load_text
from services.denoiser.__main__ import build
from services.local.suite import suite
from tests.conftest import RATE_HZ, speech
from tests.product import connected, new_session, speak
from tests.published import ADAPTER

SECONDS = 0.9  # two blocks
SIZE = (128, 64)  # of the video of a picture of 60x80


async def test_a_published_checkpoint_is_served_with_a_prompt_as_it_is_rendered(
    published: Path, store: SessionStore, picture: bytes
) -> None:
    settings, adapter, prompt = GatewaySettings(listen="127.0.0.1:0"), published / ADAPTER, "a person speaks"
    async with suite(published, store, settings, adapter=adapter) as target, connected(target) as stub:
        session = await new_session(stub, picture, seed=7, prompt=prompt)
        streamed = await speak(stub, session.id, speech(SECONDS))
    options = RenderOptions(seed=7, text=load_text(open_part(published, "text")).embed(prompt))
    chunks = list(render(load(published, LoraAdapter(adapter)), [samples()], RATE_HZ, picture, options))
    assert [len(chunk.frames) for chunk in chunks] == [1, 4, 4, 4, 4, 4]  # Wan's first latent frame is one frame
    frames = torch.cat([chunk.frames for chunk in chunks])
    assert frames.shape == (21, *SIZE, 3)
    assert streamed.pixels == [frame.numpy().tobytes() for frame in frames]
    assert frames.float().std(0).mean() > 1  # the picture moves


def samples() -> Tensor:
    return torch.frombuffer(bytearray(speech(SECONDS)), dtype=torch.int16).unsqueeze(0) / 32768


def test_a_published_checkpoint_is_rendered_with_the_references_options(published: Path, picture: bytes) -> None:
    options = RenderOptions(
        size=64 * 64,
        num_blocks=1,
        text=load_text(open_part(published, "text")).embed("a person who smiles"),
        clip_frames=24,
        pose=iter([np.zeros((64, 64, 3), np.uint8)] * 24),
        audio="whole",
        noise="clip",
    )
    chunks = render(load(published, LoraAdapter(published / ADAPTER)), [samples()], RATE_HZ, picture, options)
    frames = torch.cat([chunk.frames for chunk in chunks])
    assert frames.shape == (9, 64, 64, 3)
    assert frames.float().std(0).mean() > 1


def test_a_level_that_the_checkpoint_lacks_is_refused(published: Path, store: SessionStore) -> None:
    with pytest.raises(ValueError, match="names level 4, the schedule has 0 to 3"):
        build(DenoiserSettings(checkpoint=published, levels="0,4"), store, None)  # type: ignore[arg-type]


def test_a_partly_matching_adapter_stops_the_start(published: Path, store: SessionStore, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapter = tmp_path / ADAPTER
    save_file(
        {key: tensor for key, tensor in load_file(published / ADAPTER).items() if "blocks.3." not in key}, adapter
    )
    with pytest.raises(ValueError, match=r"does not match these weights: nothing for blocks\.3\..* and 5 more"):
        build(DenoiserSettings(checkpoint=published, adapter=adapter), store, None)  # type: ignore[arg-type]


def test_levels_in_one_process_share_one_set_of_weights(published: Path, store: SessionStore) -> None:
    settings = DenoiserSettings(checkpoint=published, adapter=published / ADAPTER)
    with DeviceQueue() as queue:
        servicer = build(settings, store, queue)
    assert servicer.levels == [0, 1, 2, 3]
    assert len({id(denoiser.network) for denoiser in servicer._denoisers.values()}) == 1
