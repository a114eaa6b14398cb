"""A stream whose client sends nothing, and is owed nothing, ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from avatar.client import connect
from avatar.errors import SilentClient
from avatar.store.sessions import SessionStore
from avatar.v1 import avatar_service_pb2 as api
from tests.conftest import speech
from tests.product import END_TURN, INTERRUPT
from tests.services.gateway.clock import VirtualTimeLoop
from tests.services.gateway.test_live_stream import BLOCK_BYTES, LIVE, OFFLINE, Pipeline
from tests.standin import standin_gateway

EMPTY = api.StreamAvatarRequest(audio=api.AudioPiece())
SAMPLE = api.StreamAvatarRequest(audio=api.AudioPiece(data=b"\1\0"))
MINUTE_S = 60.0


def in_virtual_time(body: Callable[[Pipeline], Awaitable[None]], *, live: bool = False) -> None:
    """Run a pipeline and a test's body over it."""

    async def run() -> None:
        pipeline = Pipeline(options=LIVE if live else OFFLINE, now=asyncio.get_running_loop().time)
        async with pipeline.running():
            await body(pipeline)

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(run())


def test_offline_only_audio_breaks_the_silence() -> None:
    async def body(pipeline: Pipeline) -> None:
        for number in range(3):
            await asyncio.sleep(MINUTE_S)
            for request in (EMPTY, END_TURN, INTERRUPT):
                await pipeline.stream.receive(request)
            assert pipeline.stream.silent_s() == MINUTE_S * (number + 1)
        await pipeline.stream.receive(SAMPLE)
        assert pipeline.stream.silent_s() == 0

    in_virtual_time(body)


def test_offline_a_client_that_is_owed_frames_is_not_silent() -> None:
    async def body(pipeline: Pipeline) -> None:
        pipeline.encoder.is_answer_due = True
        await asyncio.sleep(10 * MINUTE_S)
        assert pipeline.stream.silent_s() == 0, "the audio stage owes a block"
        pipeline.encoder.is_answer_due = False
        pipeline.say(1)
        await asyncio.sleep(10 * MINUTE_S)
        assert pipeline.stream.silent_s() == 0, "a block is in the pipeline"
        await asyncio.sleep(10 * MINUTE_S)
        pipeline.release()
        await asyncio.sleep(5)
        assert pipeline.frames
        assert pipeline.stream.silent_s() == 5, "since the last frame"

    in_virtual_time(body)


def test_offline_audio_that_makes_no_block_is_owed_nothing() -> None:
    async def body(pipeline: Pipeline) -> None:
        pipeline.release()
        pipeline.requests.put_nowait(api.StreamAvatarRequest(audio=api.AudioPiece(data=bytes(BLOCK_BYTES - 2))))
        await asyncio.sleep(MINUTE_S)
        assert pipeline.stream.silent_s() == MINUTE_S

    in_virtual_time(body)


def test_live_any_message_breaks_the_silence_and_frames_do_not() -> None:
    async def body(pipeline: Pipeline) -> None:
        pipeline.release()
        await asyncio.sleep(MINUTE_S)
        assert pipeline.frames
        assert pipeline.stream.silent_s() == MINUTE_S
        await pipeline.stream.receive(EMPTY)
        assert pipeline.stream.silent_s() == 0

    in_virtual_time(body, live=True)


@pytest.mark.parametrize("live", [False, True])
def test_a_stream_without_a_connection_or_that_is_closed_is_not_silent(live: bool) -> None:
    async def body(pipeline: Pipeline) -> None:
        pipeline.release()
        pipeline.stream.disconnect()
        await asyncio.sleep(MINUTE_S)
        assert pipeline.stream.silent_s() == 0
        pipeline.stream.connect()
        await pipeline.stream.receive(SAMPLE)
        await pipeline.stream.receive(api.StreamAvatarRequest(close=api.CloseAvatar()))
        await asyncio.sleep(MINUTE_S)
        assert pipeline.stream.silent_s() == 0

    in_virtual_time(body, live=live)


@pytest.mark.parametrize(("live", "silent_s"), [(False, 0.3), (True, 0.005)])
async def test_a_silent_stream_ends_with_its_reason(
    store: SessionStore, picture: bytes, live: bool, silent_s: float
) -> None:
    async with standin_gateway(store, silent_s=silent_s) as gateway, connect(gateway.target) as avatar:
        assert (await avatar.capabilities()).max_silent_s == silent_s
        session = await avatar.create(picture)

        async def stay_silent() -> None:
            async with session.stream(live=live) as stream:
                await stream.push(b"" if live else speech(1.0))
                async for _ in stream:
                    pass

        with pytest.raises(SilentClient, match="sent nothing for"):
            await stay_silent()
        assert gateway.num_streams == 0
