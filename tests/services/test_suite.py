"""The whole suite in one process: what a product team gets, and that it is what the models alone give."""

import asyncio
import shutil
import time
from pathlib import Path
from typing import Any

import grpc
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
from tests.product import CLOSE, answer, connected, new_session, opening, pieces, rest, speak, stream
from tests.refusals import refused

SECONDS = 3.0  # seven blocks: past the sink's update at block 2 and once round the window


def rendered(checkpoint: Path, picture: bytes, data: bytes, seed: int, **choices: Any) -> list[bytes]:
    samples = torch.frombuffer(bytearray(data), dtype=torch.int16).unsqueeze(0) / 32768
    chunks = render(load(checkpoint), [samples], RATE_HZ, picture, RenderOptions(seed=seed, **choices))
    return [frame.numpy().tobytes() for chunk in chunks for frame in chunk.frames]


async def test_remote_equals_local(gateway: str, checkpoint: Path, picture: bytes) -> None:
    async with connected(gateway) as stub:
        session = await new_session(stub, picture, seed=7)
        streamed = await speak(stub, session.id, speech(SECONDS))
    assert streamed.pixels == rendered(checkpoint, picture, speech(SECONDS), seed=7)


async def test_a_session_draws_as_it_has_chosen(gateway: str, checkpoint: Path, picture: bytes) -> None:
    local = {"sink_update_block": 4, "sink_distance": (0, 3)}
    remote = {"sink_update_block": 4, "min_sink_distance": 0, "max_sink_distance": 3}
    async with connected(gateway) as stub:
        session = await new_session(stub, picture, seed=7, **remote)
        streamed = await speak(stub, session.id, speech(SECONDS))
    assert streamed.pixels == rendered(checkpoint, picture, speech(SECONDS), seed=7, **local)
    assert streamed.pixels != rendered(checkpoint, picture, speech(SECONDS), seed=7)


async def test_a_session_waits_for_as_much_sound_as_it_has_chosen(
    checkpoint: Path, store: SessionStore, picture: bytes, tmp_path: Path
) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    torch.manual_seed(0)
    Wav2Vec2.tiny().save(tmp_path / "audio")
    settings = GatewaySettings(listen="127.0.0.1:0")
    async with suite(tmp_path, store, settings) as target, connected(target) as stub:
        session = await new_session(stub, picture, seed=7, audio_context=Duration(nanos=400_000_000))
        assert session.audio_context.ToMilliseconds() == 400
        streamed = await speak(stub, session.id, speech(1.5))
    assert streamed.pixels == rendered(tmp_path, picture, speech(1.5), seed=7, audio_right_frames=20)
    assert streamed.pixels != rendered(tmp_path, picture, speech(1.5), seed=7)


@pytest.mark.parametrize("denoisers", [("0", "1", "2"), ("0,1", "2")], ids=["a level each", "two and one"])
async def test_frames_do_not_depend_on_how_levels_share_denoisers(
    denoisers: tuple[str, ...], checkpoint: Path, store: SessionStore, picture: bytes
) -> None:
    settings = GatewaySettings(listen="127.0.0.1:0")
    async with suite(checkpoint, store, settings, denoisers=denoisers) as target, connected(target) as stub:
        session = await new_session(stub, picture, seed=7)
        streamed = await speak(stub, session.id, speech(SECONDS))
    assert streamed.pixels == rendered(checkpoint, picture, speech(SECONDS), seed=7)


async def test_workers_in_half_precision_show_nearly_the_same(
    checkpoint: Path, store: SessionStore, picture: bytes
) -> None:
    settings = GatewaySettings(listen="127.0.0.1:0")
    async with suite(checkpoint, store, settings, dtype="bfloat16") as target, connected(target) as stub:
        session = await new_session(stub, picture, seed=7)
        streamed = await speak(stub, session.id, speech(SECONDS))
    half, full = (
        torch.stack([torch.frombuffer(bytearray(frame), dtype=torch.uint8) for frame in frames]).float()
        for frames in (streamed.pixels, rendered(checkpoint, picture, speech(SECONDS), seed=7))
    )
    assert not torch.equal(half, full)
    assert (half - full).square().mean().sqrt() / full.std() < 0.02


async def test_another_seed_gives_other_frames(gateway: str, picture: bytes) -> None:
    async with connected(gateway) as stub:
        one, other = [await new_session(stub, picture, seed=seed) for seed in (1, 2)]
        assert (await speak(stub, one.id, speech(1))).pixels != (await speak(stub, other.id, speech(1))).pixels


async def test_interleaved_equals_alone(gateway: str, checkpoint: Path, picture: bytes) -> None:
    async with connected(gateway) as stub:
        sessions = [await new_session(stub, picture, seed=seed) for seed in range(3)]
        all_streamed = await asyncio.gather(
            *(speak(stub, session.id, speech(SECONDS, seed)) for seed, session in enumerate(sessions))
        )
    for seed, streamed in enumerate(all_streamed):
        assert streamed.pixels == rendered(checkpoint, picture, speech(SECONDS, seed), seed)


async def test_frames_do_not_depend_on_how_sound_is_cut(gateway: str, picture: bytes) -> None:
    data = speech(2)
    async with connected(gateway) as stub:
        sizes = (322, len(data))
        sessions = [await new_session(stub, picture, seed=1) for _ in sizes]
        pixels = [
            (await stream(stub, [opening(session.id), *pieces(data, size), CLOSE])).pixels
            for session, size in zip(sessions, sizes, strict=True)
        ]
    assert pixels[0] == pixels[1]


async def test_the_sink_update_changes_frames_from_its_block_on(
    checkpoint: Path, picture: bytes, tmp_path: Path
) -> None:
    still = tmp_path / "still"
    for part in ("audio", "denoiser", "vae"):
        (still / part).mkdir(parents=True)
        for file in (checkpoint / part).iterdir():
            (still / part / file.name).write_bytes(file.read_bytes())
    config = still / "denoiser" / "config.json"
    config.write_text(config.read_text().replace('"sink_update_block": 2', '"sink_update_block": null'))
    with_update = rendered(checkpoint, picture, speech(SECONDS), seed=0)
    without = rendered(still, picture, speech(SECONDS), seed=0)
    first_changed = 12 * 2 - 3
    assert with_update[:first_changed] == without[:first_changed]
    assert with_update[first_changed] != without[first_changed]


async def test_a_client_that_vanishes_leaves_the_suite_to_the_next_one(gateway: str, picture: bytes) -> None:
    async with connected(gateway) as stub:
        for number_of_frames in (0, 1, 30):
            session = await new_session(stub, picture)
            call = stub.StreamAvatar()
            await call.write(opening(session.id))
            assert (await answer(call)).opened.session.id == session.id
            for request in pieces(speech(SECONDS)):
                await call.write(request)
            for _ in range(number_of_frames):
                await call.read()
            call.cancel()
        session = await new_session(stub, picture)
        assert len((await speak(stub, session.id, speech(1))).frames) == 33


async def test_a_failing_stage_is_named_and_the_next_session_is_served(
    gateway: str, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    from avatar.denoiser.denoiser import Denoiser

    step = Denoiser.step

    def broken(self: Denoiser, block: object, state: object) -> object:
        if self.level == 1 and block.index == 3:  # type: ignore[attr-defined]
            raise RuntimeError("the device is lost")
        return step(self, block, state)  # type: ignore[arg-type]

    async with connected(gateway) as stub:
        with monkeypatch.context() as patch:
            patch.setattr(Denoiser, "step", broken)
            session = await new_session(stub, picture)
            with pytest.raises(grpc.aio.AioRpcError, match="denoiser-1: RuntimeError: the device is lost"):
                await speak(stub, session.id, speech(SECONDS))
        session = await new_session(stub, picture)
        assert (await speak(stub, session.id, speech(1))).frames


async def test_a_full_worker_refuses_and_says_when_to_retry(
    checkpoint: Path, store: SessionStore, picture: bytes
) -> None:
    settings = GatewaySettings(listen="127.0.0.1:0")
    async with suite(checkpoint, store, settings, capacity=1) as target, connected(target) as stub:
        first, second = [await new_session(stub, picture) for _ in range(2)]
        call = stub.StreamAvatar(timeout=30)
        await call.write(opening(first.id))
        await answer(call)
        async with refused("NO_CAPACITY") as refusal:
            await speak(stub, second.id, speech(0.48))
        assert refusal.retry_s
        for request in [*pieces(speech(0.48)), CLOSE]:
            await call.write(request)
        await rest(call)
        assert (await speak(stub, second.id, speech(0.48))).frames


async def test_a_live_client_is_told_when_blocks_take_longer_than_they_last(
    gateway: str, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Denoiser.step

    def slow(self: Denoiser, *arguments: Any) -> Any:
        time.sleep(0.25)  # three levels on one thread: 0.75 s for a block of 0.48 s
        return step(self, *arguments)

    async with connected(gateway) as stub, asyncio.timeout(30):
        session = await new_session(stub, picture)
        monkeypatch.setattr(Denoiser, "step", slow)
        call = stub.StreamAvatar()
        await call.write(opening(session.id, mode=pb.OpenAvatar.MODE_LIVE))
        while (notice := (await answer(call)).event.notice).kind != pb.Notice.KIND_DEGRADED:
            pass
        assert notice.message
        call.cancel()
