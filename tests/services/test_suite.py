"""The whole suite in one process: its frames equal those that the models render alone."""

import asyncio
import functools
import shutil
import time
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import torch
from google.protobuf.duration_pb2 import Duration

from avatar.audio.wav2vec2 import Wav2Vec2
from avatar.denoiser.denoiser import Denoiser
from avatar.render import RenderOptions, load, render
from avatar.settings import GatewaySettings
from avatar.store.sessions import SessionStore
from avatar.v1 import avatar_service_pb2 as pb
from services.local.suite import suite
from tests.conftest import RATE_HZ, speech
from tests.product import CLOSE, answer, connected, finish, new_session, open_stream, pieces, send, speak
from tests.refusals import refused

SECONDS = 3.0  # seven blocks: past the sink's update at block 2 and once around the window
SETTINGS = GatewaySettings(listen="127.0.0.1:0")


@functools.cache
def rendered(checkpoint: Path, picture: bytes, data: bytes, seed: int, **options: Any) -> list[bytes]:
    """Return the frames that the models give without services; leave them as they are. options: of RenderOptions."""
    samples = torch.frombuffer(bytearray(data), dtype=torch.int16).unsqueeze(0) / 32768
    chunks = render(load(checkpoint), [samples], RATE_HZ, picture, RenderOptions(seed=seed, **options))
    return [frame.numpy().tobytes() for chunk in chunks for frame in chunk.frames]


async def test_remote_equals_local_for_interleaved_sessions(gateway: str, checkpoint: Path, picture: bytes) -> None:
    async with connected(gateway) as stub:
        sessions = [await new_session(stub, picture, seed=seed) for seed in range(3)]
        all_streamed = await asyncio.gather(
            *(speak(stub, session.id, speech(SECONDS, seed)) for seed, session in enumerate(sessions))
        )
    for seed, streamed in enumerate(all_streamed):
        assert streamed.pixels == rendered(checkpoint, picture, speech(SECONDS, seed), seed)


async def test_a_sessions_sink_options_are_applied(gateway: str, checkpoint: Path, picture: bytes) -> None:
    local = {"sink_update_block": 4, "sink_distance": (0, 3)}
    remote = {"sink_update_block": 4, "min_sink_distance": 0, "max_sink_distance": 3}
    async with connected(gateway) as stub:
        session = await new_session(stub, picture, seed=7, **remote)
        streamed = await speak(stub, session.id, speech(SECONDS))
    assert streamed.pixels == rendered(checkpoint, picture, speech(SECONDS), seed=7, **local)
    assert streamed.pixels != rendered(checkpoint, picture, speech(SECONDS), seed=7)


async def test_a_sessions_audio_context_is_applied(
    checkpoint: Path, store: SessionStore, picture: bytes, tmp_path: Path
) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    torch.manual_seed(0)
    Wav2Vec2.tiny().save(tmp_path / "audio")
    async with suite(tmp_path, store, SETTINGS) as target, connected(target) as stub:
        session = await new_session(stub, picture, seed=7, audio_context=Duration(nanos=400_000_000))
        assert session.audio_context.ToMilliseconds() == 400
        streamed = await speak(stub, session.id, speech(1.5))
    assert streamed.pixels == rendered(tmp_path, picture, speech(1.5), seed=7, audio_right_frames=20)
    assert streamed.pixels != rendered(tmp_path, picture, speech(1.5), seed=7)


@pytest.mark.parametrize("denoisers", [("0", "1", "2"), ("0,1", "2")], ids=["a level each", "two and one"])
async def test_frames_do_not_depend_on_how_levels_share_denoisers(
    denoisers: tuple[str, ...], checkpoint: Path, store: SessionStore, picture: bytes
) -> None:
    async with suite(checkpoint, store, SETTINGS, denoisers=denoisers) as target, connected(target) as stub:
        session = await new_session(stub, picture, seed=7)
        streamed = await speak(stub, session.id, speech(SECONDS))
    assert streamed.pixels == rendered(checkpoint, picture, speech(SECONDS), seed=7)


async def test_half_precision_gives_nearly_the_same_frames(
    checkpoint: Path, store: SessionStore, picture: bytes
) -> None:
    async with suite(checkpoint, store, SETTINGS, dtype="bfloat16") as target, connected(target) as stub:
        session = await new_session(stub, picture, seed=7)
        streamed = await speak(stub, session.id, speech(SECONDS))
    half, full = (
        torch.stack([torch.frombuffer(bytearray(frame), dtype=torch.uint8) for frame in frames]).float()
        for frames in (streamed.pixels, rendered(checkpoint, picture, speech(SECONDS), seed=7))
    )
    assert not torch.equal(half, full)
    assert (half - full).square().mean().sqrt() / full.std() < 0.02


async def test_clients_that_vanish_do_not_disturb_the_next_one(gateway: str, picture: bytes) -> None:
    async with connected(gateway) as stub:
        for num_frames in (0, 1, 30):
            session = await new_session(stub, picture)
            call, _ = await open_stream(stub, session.id)
            await send(call, pieces(speech(SECONDS)))
            for _ in range(num_frames):
                await answer(call)
            call.cancel()
        session = await new_session(stub, picture)
        assert len((await speak(stub, session.id, speech(1))).frames) == 33


async def test_an_error_names_its_stage_and_the_next_session_is_served(
    gateway: str, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Denoiser.step

    def failing(self: Denoiser, block: Any, state: Any) -> Any:
        if self.level == 1 and block.index == 3:
            raise RuntimeError("the device is lost")
        return step(self, block, state)

    async with connected(gateway) as stub:
        with monkeypatch.context() as patch:
            patch.setattr(Denoiser, "step", failing)
            session = await new_session(stub, picture)
            with pytest.raises(grpc.aio.AioRpcError, match="denoiser-1: RuntimeError: the device is lost"):
                await speak(stub, session.id, speech(SECONDS))
        session = await new_session(stub, picture)
        assert (await speak(stub, session.id, speech(1))).frames


async def test_a_suite_at_capacity_refuses_streams_until_one_ends(
    checkpoint: Path, store: SessionStore, picture: bytes
) -> None:
    async with suite(checkpoint, store, SETTINGS, capacity=1) as target, connected(target) as stub:
        first, second = [await new_session(stub, picture) for _ in range(2)]
        call, _ = await open_stream(stub, first.id)
        async with refused("NO_CAPACITY") as refusal:
            await speak(stub, second.id, speech(0.48))
        assert refusal.retry_s
        await finish(call, [*pieces(speech(0.48)), CLOSE])
        assert (await speak(stub, second.id, speech(0.48))).frames


async def test_a_live_client_is_notified_when_blocks_are_made_too_slowly(
    checkpoint: Path, store: SessionStore, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Denoiser.step

    def slow(self: Denoiser, *arguments: Any) -> Any:
        time.sleep(0.25)  # three levels on one thread: 0.75 s for a block of 0.48 s
        return step(self, *arguments)

    async with suite(checkpoint, store, SETTINGS) as target, connected(target) as stub, asyncio.timeout(30):
        session = await new_session(stub, picture)
        monkeypatch.setattr(Denoiser, "step", slow)
        call, _ = await open_stream(stub, session.id, mode=pb.OpenAvatar.MODE_LIVE)
        while (notice := (await answer(call)).event.notice).kind != pb.Notice.KIND_DEGRADED:
            pass
        assert notice.message
        call.cancel()
