"""The suite with blocks of one latent: 160 ms, four frames, of which the first block shows one."""

import asyncio
from pathlib import Path

from avatar.denoiser.attention import MOTION_GROUPS
from avatar.settings import GatewaySettings
from avatar.store.sessions import SessionStore
from avatar.types import FRAMES_PER_LATENT, MOTION_LATENTS
from avatar.v1 import avatar_service_pb2 as pb
from avatar.vae.vae import HIDDEN_FRAMES, MOTION_FRAMES
from services.gateway.stream.in_flight import FIRST_FRAME
from services.local.suite import gateway, suite, workers
from tests.conftest import speech
from tests.product import connected, new_session, open_stream, speak
from tests.refusals import refused
from tests.services.test_suite import rendered

SETTINGS = GatewaySettings(listen="127.0.0.1:0")


def test_frames_before_the_first_and_motion_latents_follow_from_codec_and_network() -> None:
    assert FIRST_FRAME == HIDDEN_FRAMES == FRAMES_PER_LATENT - 1
    packed = sum(latents * len(frames) for (latents, _), frames in MOTION_GROUPS)
    assert (packed, MOTION_FRAMES) == (MOTION_LATENTS, 1 + (packed - 1) * FRAMES_PER_LATENT)


async def test_remote_equals_local_with_short_blocks(short_blocks: Path, store: SessionStore, picture: bytes) -> None:
    async with suite(short_blocks, store, SETTINGS) as target, connected(target) as stub:
        capabilities = await stub.GetCapabilities(pb.GetCapabilitiesRequest())
        sessions = [await new_session(stub, picture, seed=seed) for seed in range(2)]
        streams = [speak(stub, session.id, speech(1.5, seed)) for seed, session in enumerate(sessions)]
        all_streamed = await asyncio.gather(*streams)
    assert capabilities.block_frames == 4
    for seed, streamed in enumerate(all_streamed):
        assert streamed.indexes == list(range(3, 40))
        assert streamed.pixels == rendered(short_blocks, picture, speech(1.5, seed), seed)


async def test_workers_with_other_blocks_than_the_denoisers_are_named(
    checkpoint: Path, short_blocks: Path, store: SessionStore, picture: bytes
) -> None:
    async with workers(checkpoint, store, SETTINGS) as long, workers(short_blocks, store, SETTINGS) as short:
        async with gateway(store, long.model_copy(update={"vae": short.vae})) as target, connected(target) as stub:
            async with refused("CONFIG_MISMATCH") as refusal:
                await stub.GetCapabilities(pb.GetCapabilitiesRequest())
            assert "denoisers make blocks of 12 frames, vae workers of 4" in refusal.message
        async with gateway(store, short) as target, connected(target) as stub:
            first, second = [await new_session(stub, picture, seed=1) for _ in range(2)]
        # While a deployment changes, a pool may have workers of both: a session is opened at those of its blocks.
        both = short.model_copy(update={"audio": long.audio + short.audio, "vae": long.vae + short.vae})
        async with gateway(store, both) as target, connected(target) as stub:
            streamed = await speak(stub, first.id, speech(0.5))
            assert streamed.pixels == rendered(short_blocks, picture, speech(0.5), 1)
        async with gateway(store, long) as target, connected(target) as stub:
            async with refused("CONFIG_MISMATCH") as refusal:
                await open_stream(stub, second.id)
            assert "created for blocks of 4 frames, workers here make blocks of 12" in refusal.message
