"""Speech that is made again, by another worker or for another gateway, and that differs from what was delivered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from avatar.store.sessions import SessionStore
from avatar.v1 import avatar_service_pb2 as pb
from tests.product import CLOSE, END_TURN, Streamed, Stub, connected, new_session, open_stream, pieces, rest, say, send
from tests.services.gateway.test_turn_speaker import RATE_HZ, WAIT_S, events, returned
from tests.services.voice.fakes import ToneEngine, pcm16, spoken, voice_worker
from tests.standin import standin_gateways

TEXT = "One two three four five six seven."
NEXT = "m" * 20 + "."
AUDIO = b"\1\2" * RATE_HZ


@asynccontextmanager
async def two_gateways(store: SessionStore, engine: ToneEngine) -> AsyncGenerator[list[Stub], None]:
    async with AsyncExitStack() as stack:
        worker = await stack.enter_async_context(voice_worker(store, engine))
        gateways = await stack.enter_async_context(standin_gateways(store, {}, {}, voice=(worker,)))
        yield [await stack.enter_async_context(connected(each.target)) for each in gateways]


async def resumed(
    store: SessionStore, stubs: list[Stub], session: str, requests: list[pb.StreamAvatarRequest], num_samples: int
) -> tuple[int, Streamed]:
    """Stream at one gateway until so many samples of the first turn are delivered, and go on at the other.

    Return the messages that were done, and what the other one answers.
    """
    here, there = stubs
    call, _ = await open_stream(here, session, return_audio=True)
    await send(call, requests)
    reading = asyncio.ensure_future(rest(call))
    async with asyncio.timeout(WAIT_S):
        while (position := await store.position(session)).num_turn_samples < num_samples:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    reading.cancel()
    again, opened = await open_stream(there, session, resume=pb.ResumeAvatar(next_frame=position.next_frame))
    await send(again, requests[opened.num_messages :])
    streamed = Streamed()
    async with asyncio.timeout(WAIT_S):
        for response in await rest(again):
            streamed.add(response)
    return opened.num_messages, streamed


@pytest.mark.parametrize("speed", [1.0, 0.2, 1.4])
@pytest.mark.parametrize("is_text", [False, True])
async def test_nothing_is_cut_off_the_turn_after_a_resumed_one(
    store: SessionStore, speed: float, is_text: bool
) -> None:
    engine = ToneEngine()
    stopped = asyncio.Event()

    async def stop() -> None:
        if engine.num_parts == 7:  # 1.4 s of 1.7 s
            engine.before, engine.char_s = None, 0.05 * speed
            stopped.set()
            await asyncio.Event().wait()

    engine.before = stop
    following = [say(NEXT)] if is_text else list(pieces(AUDIO, 6400))
    async with two_gateways(store, engine) as stubs:
        session = (await new_session(stubs[0], b"picture")).id
        requests = [say(TEXT), END_TURN, *following, END_TURN, CLOSE]
        num_done, streamed = await resumed(store, stubs, session, requests, 6000)
    assert (stopped.is_set(), num_done) == (True, 0)
    first, second = events(streamed, "playback_finished")
    assert (first.spoken, second.spoken) == (TEXT, NEXT if is_text else "")
    next_audio = pcm16(spoken(NEXT, char_s=0.05 * speed)) if is_text else AUDIO
    assert second.position_us == len(next_audio) // 2 * 1_000_000 // RATE_HZ
    assert returned(streamed).endswith(next_audio)
