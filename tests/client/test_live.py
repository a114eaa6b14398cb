"""The client's live streams over the real gateway, and over connections that break."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from avatar.client import Audio, Frame, Item, Notice, PlaybackFinished, PlaybackStarted, Stream, WordStarted, connect
from avatar.client import stream as client_stream
from avatar.errors import ConnectionLost
from avatar.store.sessions import SessionStore
from tests.conftest import speech
from tests.proxy import Proxy, proxied
from tests.services.voice.fakes import ToneEngine, voice_worker
from tests.standin import standin_gateway


@asynccontextmanager
async def live_stream(
    store: SessionStore, *, settings: dict[str, Any] | None = None, **options: Any
) -> AsyncGenerator[tuple[Stream, Proxy], None]:
    """A live stream over a proxy. settings: of the gateway. options: of the stream."""
    async with (
        standin_gateway(store, **settings or {}) as gateway,
        proxied(gateway.target) as proxy,
        connect(proxy.target) as avatar,
        (await avatar.create(b"face")).stream(live=True, **options) as stream,
    ):
        yield stream, proxy


async def until(stream: Stream, kind: type[Item]) -> list[Item]:
    """The next items, up to the first of a kind."""
    items: list[Item] = []
    async for item in stream:
        items.append(item)
        if isinstance(item, kind):
            break
    return items


def finish(items: list[Item]) -> PlaybackFinished:
    """The last item, which ends a turn."""
    assert isinstance(items[-1], PlaybackFinished)
    return items[-1]


def samples(data: bytes) -> list[int]:
    """The samples of speech, without silence: the gateway inserts some where speech is late."""
    return [each for each in np.frombuffer(data, "<i2").tolist() if each]


def spoken(items: list[Item]) -> list[int]:
    """The samples of speech that came back."""
    return samples(b"".join(item.data for item in items if isinstance(item, Audio)))


def assert_complete(items: list[Item]) -> None:
    """Frames and events have neither a gap nor a repetition."""
    frames = [item.index for item in items if isinstance(item, Frame)]
    assert frames == list(range(3, 3 + len(frames)))
    events = [item.number for item in items if not isinstance(item, Frame | Audio)]
    assert events == list(range(len(events)))


async def speak(stream: Stream, data: bytes) -> None:
    """A whole turn."""
    await stream.push(data)
    await stream.end_turn()


async def test_a_turn_starts_before_its_first_frame_and_finishes_after_its_last(store: SessionStore) -> None:
    async with live_stream(store) as (stream, _):
        idle = [await anext(stream) for _ in range(9)]
        await speak(stream, speech(1.0))
        items = await until(stream, PlaybackFinished)
    assert all(isinstance(item, Frame) and item.is_idle for item in idle)
    started, finished = next(item for item in items if isinstance(item, PlaybackStarted)), finish(items)
    assert (started.turn, finished.turn, finished.position_s, finished.was_interrupted) == (0, 0, 1.0, False)
    shown = [item.index for item in items if isinstance(item, Frame) and not item.is_idle]
    first = items[items.index(started) + 1]
    assert isinstance(first, Frame)
    assert first.index == shown[0]
    assert shown[0] < finished.next_frame <= shown[-1] + 1
    assert all(item.index < finished.next_frame for item in items if isinstance(item, Frame))


async def test_an_interrupt_reports_the_position_and_drops_pending_audio(store: SessionStore) -> None:
    settings = {"live_ahead_s": 2.0}
    async with live_stream(store, settings=settings, return_audio=True) as (stream, _), asyncio.TaskGroup() as tasks:
        pushing = tasks.create_task(stream.push(speech(60.0)))
        items = await until(stream, PlaybackStarted)
        items += await until(stream, Frame)
        interrupted = await stream.interrupt()
        await pushing
        items += await until(stream, PlaybackFinished)
        finished = finish(items)
        await speak(stream, speech(0.5, seed=1))
        rest = await until(stream, PlaybackFinished)
    assert interrupted.was_speaking
    assert interrupted.position_s == finished.position_s > 0
    assert interrupted.next_frame == finished.next_frame
    assert spoken(rest) == samples(speech(0.5, seed=1))
    assert_complete(items + rest)


async def test_an_interrupt_is_answered_while_nobody_iterates(
    store: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_stream, "MAX_QUEUED_ITEMS", 4)
    async with live_stream(store) as (stream, _):
        await stream.push(speech(3.0))
        await anext(stream)
        await asyncio.sleep(1)  # more items arrive than are read ahead
        async with asyncio.timeout(5):
            await stream.interrupt()


async def test_an_interrupt_from_elsewhere_lets_a_waiting_push_continue(store: SessionStore) -> None:
    async with standin_gateway(store, live_ahead_s=1.0) as gateway, connect(gateway.target) as avatar:
        session = await avatar.create(b"face")
        async with session.stream(live=True, return_audio=True) as stream, asyncio.TaskGroup() as tasks:
            tasks.create_task(speak(stream, speech(2.0)))
            await until(stream, PlaybackStarted)
            assert (await session.interrupt()).was_speaking
            await until(stream, PlaybackFinished)
            items = await until(stream, PlaybackFinished)
    rest = samples(speech(2.0)[-16000:])
    assert spoken(items)[-len(rest) :] == rest


async def test_audio_never_runs_further_ahead_than_the_gateway_accepts(store: SessionStore) -> None:
    turns = [0.6, 0.7, 0.8]  # they end at different positions in a block

    async def speak_all(stream: Stream) -> None:
        for seconds in turns:
            await speak(stream, speech(seconds))

    settings = {"live_ahead_s": 1.0}
    async with live_stream(store, settings=settings) as (stream, _), asyncio.TaskGroup() as tasks:
        tasks.create_task(speak_all(stream))
        items: list[Item] = []
        for seconds in turns:
            items += await until(stream, PlaybackFinished)
            assert finish(items).position_s == pytest.approx(seconds)
    assert not [item for item in items if isinstance(item, Notice)]


async def test_a_cancelled_push_leaves_the_stream_intact(store: SessionStore) -> None:
    async with live_stream(store, settings={"live_ahead_s": 1.0}) as (stream, _):
        call = stream._call
        for _ in range(5):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(stream.push(speech(60.0)), 0.02)
        await stream.interrupt()
        await stream.close()
        assert_complete([item async for item in stream])
        assert stream._call is call


async def test_a_fragment_holds_the_frames_of_a_block(store: SessionStore) -> None:
    async with live_stream(store, video="fmp4") as (stream, _):
        assert stream.init_segment == b"init"
        frames = [await anext(stream) for _ in range(3)]
    assert [(frame.index, frame.num_frames) for frame in frames if isinstance(frame, Frame)] == [
        (3, 9),
        (12, 12),
        (24, 12),
    ]


async def test_audio_returns_before_its_frames(store: SessionStore) -> None:
    async with live_stream(store, return_audio=True) as (stream, _):
        await stream.push(speech(1.0))
        await stream.close()
        items = [item async for item in stream]
    for piece in [item for item in items if isinstance(item, Audio)]:
        follows = items[items.index(piece) + 1]
        while not isinstance(follows, Frame):
            follows = items[items.index(follows) + 1]
        assert follows.pts_s == piece.pts_s
    assert spoken(items) == samples(speech(1.0))


async def test_a_slow_reader_bounds_the_items_in_memory(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_stream, "MAX_QUEUED_ITEMS", 4)
    async with live_stream(store) as (stream, _):
        await anext(stream)
        await asyncio.sleep(1)  # 25 frames
        assert len(stream._items) <= 4 + 1


@pytest.mark.parametrize("per_block", [False, True])
async def test_a_broken_connection_leaves_neither_gap_nor_repetition(store: SessionStore, per_block: bool) -> None:
    data = speech(3.5)
    settings = {"live_ahead_s": 1.5}
    async with (
        live_stream(store, settings=settings, return_audio=True, per_block=per_block) as (stream, proxy),
        asyncio.TaskGroup() as tasks,
    ):
        tasks.create_task(speak(stream, data))
        items: list[Item] = []
        calls = {stream._call}
        async for item in stream:
            items.append(item)
            calls.add(stream._call)
            if isinstance(item, PlaybackFinished):
                break
            if len(items) in (5, 30, 31) or (isinstance(item, Audio) and item.pts_s > 2):
                proxy.cut()
    assert len(calls) > 4
    assert_complete(items)
    assert spoken(items) == samples(data)


async def test_requests_sent_while_the_connection_is_broken_arrive_once(store: SessionStore) -> None:
    async with live_stream(store, return_audio=True) as (stream, proxy), asyncio.TaskGroup() as tasks:
        await stream.push(speech(1.0))
        items = [await anext(stream)]
        proxy.swallow()
        proxy.cut()
        sending = tasks.create_task(speak(stream, speech(1.0, seed=1)))
        await asyncio.sleep(0.3)
        assert not sending.done()
        proxy.mend()
        items += await until(stream, PlaybackFinished)
    assert finish(items).position_s == 2.0
    assert spoken(items) == samples(speech(1.0) + speech(1.0, seed=1))


async def test_text_sent_while_the_connection_is_broken_is_spoken_once(store: SessionStore) -> None:
    engine = ToneEngine()
    async with (
        voice_worker(store, engine) as voice,
        live_stream(store, settings={"voice": (voice,)}) as (stream, proxy),
        asyncio.TaskGroup() as tasks,
    ):
        await stream.say("Good day. I")
        items = await until(stream, WordStarted)
        proxy.swallow()
        proxy.cut()
        sending = tasks.create_task(stream.say(" am Ada."))
        await asyncio.sleep(0.1)  # it may be written into the dead connection
        proxy.mend()
        await sending
        await stream.end_turn()
        items += await until(stream, PlaybackFinished)
    assert finish(items).spoken == "Good day. I am Ada."
    assert [item.word for item in items if isinstance(item, WordStarted)] == ["Good", "day.", "I", "am", "Ada."]
    assert engine.sentences == ["Good day.", "I am Ada."]
    assert_complete(items)


async def test_an_interrupt_survives_a_broken_connection(store: SessionStore) -> None:
    async with live_stream(store, return_audio=True) as (stream, proxy), asyncio.TaskGroup() as tasks:
        await stream.push(speech(3.0))
        items = await until(stream, PlaybackStarted)
        proxy.swallow()
        proxy.cut()
        tasks.create_task(stream.push(speech(3.0)))  # never arrives, and is dropped
        await asyncio.sleep(0.05)
        interrupting = tasks.create_task(stream.interrupt())
        await asyncio.sleep(0.05)
        proxy.mend()
        assert (await interrupting).next_frame > 3
        items += await until(stream, PlaybackFinished)
        await speak(stream, speech(0.5, seed=1))
        rest = await until(stream, PlaybackFinished)
    assert spoken(rest) == samples(speech(0.5, seed=1))
    assert_complete(items + rest)


async def test_a_stream_resumes_until_the_end_of_the_grace_period(store: SessionStore) -> None:
    await resume_at(store, 2.0, 1.7, is_refused=True)


@pytest.mark.slow
@pytest.mark.parametrize("is_refused", [True, False])
@pytest.mark.parametrize("away_s", [8.5, 9.7])
async def test_a_stream_resumes_until_the_end_of_the_default_grace_period(
    store: SessionStore, away_s: float, is_refused: bool
) -> None:
    await resume_at(store, 10.0, away_s, is_refused)


async def resume_at(store: SessionStore, resume_s: float, away_s: float, is_refused: bool) -> None:
    """Speak over a gateway that is away for a while: it refuses connections, or accepts them and stays silent."""
    async with live_stream(store, settings={"resume_s": resume_s}, return_audio=True) as (stream, proxy):
        await stream.push(speech(0.4))
        items = [await anext(stream)]
        started = time.monotonic()
        if is_refused:
            proxy.leave()
        else:
            proxy.swallow()
            proxy.cut()
        await asyncio.sleep(away_s - (time.monotonic() - started))
        proxy.mend()
        await speak(stream, speech(0.1, seed=1))
        items += await until(stream, PlaybackFinished)
    assert finish(items).position_s == 0.5
    assert_complete(items)


async def test_a_connection_that_stays_broken_is_lost_after_the_grace_period(store: SessionStore) -> None:
    async with live_stream(store, settings={"resume_s": 0.3}) as (stream, proxy):
        proxy.swallow()
        proxy.cut()
        with pytest.raises(ConnectionLost):
            await until(stream, PlaybackStarted)
        with pytest.raises(ConnectionLost):
            await stream.push(speech(0.1))
        with pytest.raises(ConnectionLost):
            await stream.interrupt()
        proxy.mend()
