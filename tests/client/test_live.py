"""The client over a gateway by script: live mode, and connections that break."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from avatar.client import (
    Audio,
    Frame,
    Item,
    NoticeKind,
    PlaybackFinished,
    PlaybackStarted,
    Stream,
    connect,
)
from avatar.client.stream import MAX_QUEUED_ITEMS
from avatar.errors import ConnectionLost, ResumeImpossible
from avatar.v1 import avatar_service_pb2 as pb
from tests.client.gateway import Gateway, Wire, scripted, wired
from tests.conftest import RATE_HZ, sound

SECOND_BYTES = 2 * RATE_HZ


@asynccontextmanager
async def talking(gateway: Gateway, **options: object) -> AsyncGenerator[tuple[Stream, Wire], None]:
    """A live stream over a wire."""
    async with (
        scripted(gateway) as target,
        wired(target) as (address, wire),
        connect(address) as avatar,
        (await avatar.create(b"face")).stream(live=True, **options) as stream,  # type: ignore[arg-type]
    ):
        yield stream, wire


async def until(stream: Stream, kind: type[Item]) -> list[Item]:
    """What comes, up to the first of a kind."""
    items: list[Item] = []
    async for item in stream:
        items.append(item)
        if isinstance(item, kind):
            break
    return items


def spoken(items: list[Item]) -> list[int]:
    return [item.index for item in items if isinstance(item, Frame) and not item.is_idle]


async def test_a_turn_starts_before_its_first_frame_and_finishes_after_its_last() -> None:
    async with talking(Gateway()) as (stream, _):
        await stream.push(sound(1.0))
        await stream.end_turn()
        items = await until(stream, PlaybackFinished)
    started = next(item for item in items if isinstance(item, PlaybackStarted))
    finished = items[-1]
    assert isinstance(finished, PlaybackFinished)
    assert (started.turn, finished.turn, finished.position_s, finished.was_interrupted) == (0, 0, 1.0, False)
    first = items[items.index(started) + 1]
    assert isinstance(first, Frame)
    assert first.index == spoken(items)[0]
    assert finished.next_frame == spoken(items)[-1] + 1


async def test_it_idles_when_nobody_speaks() -> None:
    async with talking(Gateway()) as (stream, _):
        idle = [await anext(stream) for _ in range(30)]
    assert all(isinstance(item, Frame) and item.is_idle for item in idle)


async def test_an_interrupt_says_what_was_shown_and_drops_what_waits_to_be_sent() -> None:
    gateway = Gateway(max_live_ahead_s=2.0)
    async with talking(gateway) as (stream, _), asyncio.TaskGroup() as tasks:
        pushing = tasks.create_task(stream.push(sound(60.0)))
        items = await until(stream, PlaybackStarted)
        items += [await anext(stream) for _ in range(20)]
        interrupted = await stream.interrupt()
        await pushing
        heard = len(gateway.talk.heard)
        rest = await until(stream, PlaybackFinished)
        finished = rest[-1]
        await stream.push(sound(0.5))
        again = await until(stream, PlaybackStarted)
    assert isinstance(finished, PlaybackFinished)
    assert interrupted.was_speaking
    assert interrupted.position_s == finished.position_s > 0
    assert interrupted.next_frame == finished.next_frame
    assert heard < 10 * SECOND_BYTES
    assert gateway.talk.heard[heard:] == sound(0.5)
    frames = [item.index for item in items + rest + again if isinstance(item, Frame)]
    assert frames == list(range(3, 3 + len(frames)))


async def test_an_interrupt_is_answered_while_nobody_iterates() -> None:
    async with talking(Gateway(tick_s=0.001)) as (stream, _):
        await stream.push(sound(3.0))
        await anext(stream)
        await asyncio.sleep(0.3)  # more waits than is read ahead
        async with asyncio.timeout(5):
            await stream.interrupt()


async def test_an_interrupt_from_elsewhere_lets_a_waiting_push_go_on() -> None:
    gateway = Gateway(max_live_ahead_s=2.0, tick_s=0.01)
    async with scripted(gateway) as target, connect(target) as avatar:
        session = await avatar.create(b"face")
        async with session.stream(live=True) as stream, asyncio.TaskGroup() as tasks:
            pushing = tasks.create_task(stream.push(sound(5.0)))
            await until(stream, PlaybackStarted)
            interrupted = await session.interrupt()
            while not pushing.done() or len(gateway.talk.heard) < len(sound(5.0)):  # what is sent is under way yet
                await anext(stream)
    assert interrupted.was_speaking
    assert gateway.talk.heard == sound(5.0)


async def test_sound_never_runs_further_ahead_than_is_taken() -> None:
    gateway = Gateway(max_live_ahead_s=2.0, tick_s=0.005)

    async def speak(stream: Stream) -> None:
        for turn in range(12):
            await stream.push(sound(1.1 + turn / 10))  # ends in the middle of a block
            await stream.end_turn()

    async with talking(gateway) as (stream, _), asyncio.TaskGroup() as tasks:
        tasks.create_task(speak(stream))
        for turn in range(12):
            finished = (await until(stream, PlaybackFinished))[-1]
            assert isinstance(finished, PlaybackFinished)
            assert finished.position_s == pytest.approx(1.1 + turn / 10)
    assert gateway.talk.refused == 0


async def test_a_push_that_is_cancelled_leaves_the_stream_as_it_is() -> None:
    gateway = Gateway(max_live_ahead_s=1.0)
    async with talking(gateway) as (stream, _):
        for _ in range(5):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(stream.push(sound(60.0)), 0.02)
        await stream.interrupt()
        await stream.close()
        frames = [item.index async for item in stream if isinstance(item, Frame)]
    assert frames == list(range(3, 3 + len(frames)))
    assert gateway.num_calls == 1


@pytest.mark.parametrize("per_block", [False, True])
async def test_frames_come_one_by_one_however_they_are_sent(per_block: bool) -> None:
    async with talking(Gateway(), per_block=per_block, video="fmp4") as (stream, _):
        frames = [await anext(stream) for _ in range(30)]
        assert stream.init_segment == b"init"
    assert [frame.index for frame in frames if isinstance(frame, Frame)] == list(range(3, 33))


async def test_the_sound_comes_back_before_its_frames() -> None:
    async with talking(Gateway(), return_audio=True) as (stream, _):
        await stream.push(sound(2.0))
        await stream.close()
        items = [item async for item in stream]
    pieces = [item for item in items if isinstance(item, Audio)]
    for piece in pieces:
        follows = items[items.index(piece) + 1]
        assert isinstance(follows, Frame)
        assert follows.pts_s == piece.pts_s
    assert sound(2.0) in b"".join(piece.data for piece in pieces)


async def test_notices_are_typed_and_unknown_ones_do_no_harm() -> None:
    gateway = Gateway()
    async with talking(gateway) as (stream, _):
        gateway.talk.tell(notice=pb.Notice(kind=pb.Notice.KIND_GOING_AWAY, message="bye", within_s=3.5))
        gateway.talk.tell(notice=pb.Notice(kind=99))  # type: ignore[arg-type]
        notices: list[Item] = []
        while len(notices) < 2:
            if not isinstance(item := await anext(stream), Frame):
                notices.append(item)
    told, unknown = notices
    assert (told.kind, told.message, told.within_s) == (NoticeKind.GOING_AWAY, "bye", 3.5)  # type: ignore[union-attr]
    assert unknown.kind is NoticeKind.UNKNOWN  # type: ignore[union-attr]


async def test_a_slow_reader_holds_the_gateway_back_and_not_its_own_memory() -> None:
    gateway = Gateway(tick_s=0.001)
    async with talking(gateway) as (stream, _):
        await anext(stream)
        await asyncio.sleep(0.3)
        assert len(stream._items) <= MAX_QUEUED_ITEMS + 1
        assert len(gateway.talk.log) > 4 * MAX_QUEUED_ITEMS


async def test_the_token_and_the_updated_prompt_reach_the_gateway() -> None:
    gateway = Gateway()
    async with scripted(gateway) as target, connect(target, token="secret") as avatar:
        await avatar.capabilities()
        session = await avatar.create(b"face")
        assert session.notice == "not a face"
        assert await session.update(prompt="smiling") == 7
    assert session.info.prompt == "smiling"
    assert gateway.metadata["authorization"] == "Bearer secret"


@pytest.mark.parametrize("per_block", [False, True])
async def test_a_broken_connection_leaves_neither_gap_nor_repeat(per_block: bool) -> None:
    said = sound(12.0)
    gateway = Gateway(max_live_ahead_s=2.0, tick_s=0.05)
    options = {"return_audio": True, "per_block": per_block}
    async with talking(gateway, **options) as (stream, wire), asyncio.TaskGroup() as tasks:
        tasks.create_task(speak_and_close(stream, said))
        items: list[Item] = []
        async for item in stream:
            items.append(item)
            if len(items) in (5, 100, 101) or (isinstance(item, Audio) and item.pts_s > 9):
                wire.cut()
    assert gateway.num_calls > 7
    assert gateway.talk.heard == said
    frames = [item.index for item in items if isinstance(item, Frame)]
    assert frames == list(range(3, 3 + len(frames)))
    events = [item.number for item in items if not isinstance(item, Frame | Audio)]
    assert events == list(range(len(events)))
    assert said in b"".join(item.data for item in items if isinstance(item, Audio))


async def test_what_is_sent_while_the_connection_is_broken_arrives_once() -> None:
    gateway = Gateway()
    async with talking(gateway) as (stream, wire), asyncio.TaskGroup() as tasks:
        await stream.push(sound(1.0))
        await anext(stream)
        wire.is_down = True
        wire.cut()
        sending = tasks.create_task(speak_and_end(stream, sound(1.0, seed=1)))
        await asyncio.sleep(0.3)
        assert not sending.done()
        wire.is_down = False
        items = await until(stream, PlaybackFinished)
    assert gateway.talk.heard == sound(1.0) + sound(1.0, seed=1)
    assert isinstance(items[-1], PlaybackFinished)
    assert items[-1].position_s == 2.0


async def test_an_interrupt_outlives_the_connection() -> None:
    gateway = Gateway()
    async with talking(gateway) as (stream, wire), asyncio.TaskGroup() as tasks:
        await stream.push(sound(3.0))
        await until(stream, PlaybackStarted)
        wire.is_down = True
        wire.cut()
        tasks.create_task(stream.push(sound(3.0)))  # never arrives, and is dropped
        await asyncio.sleep(0.05)
        interrupting = tasks.create_task(stream.interrupt())
        await asyncio.sleep(0.05)
        wire.is_down = False
        assert (await interrupting).next_frame > 3
        await stream.push(sound(0.5, seed=1))
        # It is on its way when `push` returns; a stream that is left then may cut off what has not arrived.
        async with asyncio.timeout(10):
            while not bytes(gateway.talk.heard).endswith(sound(0.5, seed=1)):  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def test_a_gateway_that_has_not_noticed_the_break_is_asked_again() -> None:
    gateway = Gateway()
    async with talking(gateway) as (stream, wire):
        await anext(stream)
        gateway.num_busy = 2
        wire.cut()
        frames = [item.index for item in [await anext(stream) for _ in range(100)] if isinstance(item, Frame)]
    assert frames == list(range(4, 104))
    assert gateway.num_busy == 0


async def test_a_connection_that_stays_broken_is_lost_after_the_grace_period() -> None:
    async with talking(Gateway(resume_s=0.3)) as (stream, wire):
        wire.cut(for_good=True)
        with pytest.raises(ConnectionLost):
            await until(stream, PlaybackStarted)
        with pytest.raises(ConnectionLost):
            await stream.push(sound(0.1))
        with pytest.raises(ConnectionLost):
            await stream.interrupt()


async def test_frames_that_are_gone_end_the_stream() -> None:
    gateway = Gateway()
    async with talking(gateway) as (stream, wire):
        gateway.forgets = True
        wire.cut()
        with pytest.raises(ResumeImpossible):
            await until(stream, PlaybackStarted)


async def speak_and_close(stream: Stream, data: bytes) -> None:
    await stream.push(data)
    await stream.close()


async def speak_and_end(stream: Stream, data: bytes) -> None:
    await stream.push(data)
    await stream.end_turn()
