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
from tests.standin import standin_gateway, standin_gateways

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
    # The client may lack words of the seconds before.
    words = [each.word for each in events(streamed, "word_started") if each.turn == 0]
    assert words == TEXT.split()
    next_audio = pcm16(spoken(NEXT, char_s=0.05 * speed)) if is_text else AUDIO
    assert second.position_us == len(next_audio) // 2 * 1_000_000 // RATE_HZ
    assert returned(streamed).endswith(next_audio)


@pytest.mark.parametrize("char_s", [0.01, 0.07])
async def test_a_sentence_that_another_worker_speaks_anew_takes_nothing_of_the_next(
    store: SessionStore, char_s: float
) -> None:
    engines, lost = [ToneEngine(), ToneEngine()], asyncio.Queue[int]()

    async def stop() -> None:
        for at, each in enumerate(engines):
            if each.num_parts == 7:  # 1.4 s of 1.7 s
                each.num_parts, engines[1 - at].char_s = 0, char_s
                lost.put_nowait(at)
                await asyncio.Event().wait()

    async with AsyncExitStack() as stack:
        workers, targets = [await stack.enter_async_context(AsyncExitStack()) for _ in engines], []
        for engine, worker in zip(engines, workers, strict=True):
            engine.before = stop
            targets.append(await worker.enter_async_context(voice_worker(store, engine)))
        gateway = await stack.enter_async_context(standin_gateway(store, voice=tuple(targets)))
        stub = await stack.enter_async_context(connected(gateway.target))
        call, _ = await open_stream(stub, (await new_session(stub, b"picture")).id, return_audio=True)
        await send(call, [say(f"{TEXT} {NEXT}"), END_TURN, CLOSE])
        streamed = Streamed()
        async with asyncio.timeout(WAIT_S):
            at = await lost.get()
            engines[1 - at].before = None
            await workers[at].aclose()
            for response in await rest(call):
                streamed.add(response)
    following = pcm16(spoken(NEXT, char_s=char_s))
    # The sentence is as long as the longer one of the two: 1.4 s had come.
    first = max(1.4, len(TEXT) * char_s)
    (finished,) = events(streamed, "playback_finished")
    assert returned(streamed).endswith(following)
    assert finished.position_us == pytest.approx(first * 1e6 + len(following) / 2 / RATE_HZ * 1e6, abs=1000)
    words = events(streamed, "word_started")
    assert [each.word for each in words] == f"{TEXT} {NEXT}".split()
    starts = [each.position_us for each in words]
    assert starts == sorted(starts)
    assert starts[-1] == pytest.approx(first * 1e6, abs=1000)
