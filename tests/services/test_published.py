"""Tests of a checkpoint in the published layout: served by the suite, and rendered."""

from pathlib import Path
from unittest.mock import patch

import grpc.aio
import numpy as np
import pytest
import torch
from torch import Tensor

from avatar.checkpoints.layouts import open_part
from avatar.checkpoints.lora import LoraAdapter
from avatar.denoiser.denoiser import Denoiser
from avatar.render import RenderOptions, load, render
from avatar.rpc.channel import channel
from avatar.rpc.server import serving
from avatar.runtime.device_queue import DeviceQueue
from avatar.settings import AudioSettings, DenoiserSettings, GatewaySettings, TextSettings, VaeSettings
from avatar.store.sessions import SessionStore
from avatar.text.model import TextEncoder
from avatar.text.model import load as load_text
from avatar.v1 import avatar_service_pb2 as pb
from avatar.vae.vae import Vae
from avatar.worker.v1 import vae_pb2
from avatar.worker.v1.vae_pb2_grpc import VaeServiceStub
from services.audio.__main__ import build as build_audio
from services.denoiser.__main__ import build as build_denoiser
from services.local.suite import suite
from services.text.__main__ import build as build_text
from services.vae.__main__ import build as build_vae
from tests.conftest import RATE_HZ, speech
from tests.product import connected, new_session, speak
from tests.published import ADAPTER

SECONDS = 0.9  # two blocks
SIZE = (64, 64)


async def test_a_published_checkpoint_is_served_with_a_prompt_as_it_is_rendered(
    published: Path, store: SessionStore, picture: bytes
) -> None:
    settings, adapter, prompt = GatewaySettings(listen="127.0.0.1:0"), published / ADAPTER, "a person speaks"
    async with (
        suite(published, store, settings, adapter=adapter, sizes=("64x64",)) as target,
        connected(target) as stub,
    ):
        session = await new_session(stub, picture, seed=7, prompt=prompt)
        streamed = await speak(stub, session.id, speech(SECONDS))
        capabilities = await stub.GetCapabilities(pb.GetCapabilitiesRequest())
    assert [(each.width, each.height) for each in capabilities.video_formats] == [SIZE]
    assert capabilities.sustained_rate > 0
    options = RenderOptions(seed=7, size=SIZE, text=load_text(open_part(published, "text")).embed(prompt))
    chunks = list(render(load(published, LoraAdapter(adapter)), [samples()], RATE_HZ, picture, options))
    assert [len(chunk.frames) for chunk in chunks] == [1, 4, 4, 4, 4, 4]  # Wan's first latent frame is one frame
    frames = torch.cat([chunk.frames for chunk in chunks])
    assert frames.shape == (21, *SIZE, 3)
    assert streamed.pixels == [frame.numpy().tobytes() for frame in frames]
    assert frames.float().std(0).mean() > 1  # the picture moves


async def test_a_published_checkpoint_is_warm_at_its_default_sizes(published: Path, store: SessionStore) -> None:
    with (
        DeviceQueue() as queue,
        patch.object(Denoiser, "warm", autospec=True, return_value=1) as denoised,
        patch.object(Vae, "warm", autospec=True, return_value=1) as decoded,
        patch.object(Vae, "warm_encoder", autospec=True) as encoded,
        patch.object(TextEncoder, "warm") as embedded,
    ):
        denoiser = build_denoiser(DenoiserSettings(checkpoint=published), store, queue)
        vae = build_vae(VaeSettings(checkpoint=published), queue)
        audio = build_audio(AudioSettings(checkpoint=published), queue)
        build_text(TextSettings(checkpoint=published), store, queue)
    sizes = [(704, 384), (640, 448), (512, 512), (448, 640), (384, 704)]
    assert [(each.width, each.height) for each in vae.info().sizes] == sizes
    assert {call.args[1:] for call in decoded.call_args_list} == {*sizes}
    assert [call.args[1:] for call in encoded.call_args_list] == sizes
    assert {(call.args[0].level, *call.args[1:]) for call in denoised.call_args_list} == {
        (level, height // 8, width // 8) for level in range(4) for width, height in sizes
    }
    assert embedded.call_count == 1
    assert min(denoiser.info().step_s, vae.info().step_s, vae.info().latent_step_s, audio.info().step_s) > 0


async def test_a_picture_is_fitted_to_a_served_size_and_the_reference_says_which(
    published: Path, picture: bytes
) -> None:
    with DeviceQueue() as queue, patch.object(Vae, "warm", return_value=1), patch.object(Vae, "warm_encoder"):
        vae = build_vae(VaeSettings(checkpoint=published, sizes=("128x64", "64x64")), queue)
        async with serving("127.0.0.1:0", vae) as port, channel(f"127.0.0.1:{port}") as connection:
            stub = VaeServiceStub(connection)
            requests = [
                vae_pb2.EncodeReferenceRequest(picture=picture),
                vae_pb2.EncodeReferenceRequest(picture=picture, width=128, height=64),
            ]
            made = [(await stub.EncodeReference(request)).reference for request in requests]
            with pytest.raises(grpc.aio.AioRpcError, match=r"size must be one of 128x64, 64x64, .* got 192x64"):
                await stub.EncodeReference(vae_pb2.EncodeReferenceRequest(picture=picture, width=192, height=64))
    assert [(each.width, each.height) for each in made] == [(64, 64), (128, 64)]
    assert [tuple(each.motion.shape[2:]) for each in made] == [(8, 8), (8, 16)]


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
        build_denoiser(DenoiserSettings(checkpoint=published, levels="0,4"), store, None)  # type: ignore[arg-type]


def test_a_partly_matching_adapter_stops_the_start(published: Path, store: SessionStore, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapter = tmp_path / ADAPTER
    save_file(
        {key: tensor for key, tensor in load_file(published / ADAPTER).items() if "blocks.3." not in key}, adapter
    )
    with pytest.raises(ValueError, match=r"does not match these weights: nothing for blocks\.3\..* and 5 more"):
        build_denoiser(DenoiserSettings(checkpoint=published, adapter=adapter), store, None)  # type: ignore[arg-type]


def test_levels_in_one_process_share_one_set_of_weights(published: Path, store: SessionStore) -> None:
    settings = DenoiserSettings(checkpoint=published, adapter=published / ADAPTER, sizes=("64x64",))
    with DeviceQueue() as queue:
        servicer = build_denoiser(settings, store, queue)
    assert servicer.levels == [0, 1, 2, 3]
    assert len({id(denoiser.network) for denoiser in servicer._denoisers.values()}) == 1
