"""The client in a conversation with the real suite, over a wire that breaks."""

import asyncio

from avatar.client import Audio, Frame, Item, PlaybackFinished, PlaybackStarted, Stream, connect
from tests.client.gateway import wired
from tests.conftest import sound


async def said(stream: Stream, data: bytes) -> None:
    await stream.push(data)
    await stream.end_turn()


async def until(stream: Stream, kind: type[Item]) -> list[Item]:
    items: list[Item] = []
    async for item in stream:
        items.append(item)
        if isinstance(item, kind):
            break
    return items


async def test_a_conversation_outlives_its_connection_and_an_interrupt(gateway: str, picture: bytes) -> None:
    async with wired(gateway) as (address, wire), connect(address) as avatar:
        session = await avatar.create(picture, seed=7)
        async with session.stream(live=True, return_audio=True) as stream, asyncio.TaskGroup() as tasks:
            await said(stream, sound(2.5))
            items = await until(stream, PlaybackStarted)
            await asyncio.sleep(0.6)  # the end of the turn has arrived for certain
            wire.cut()
            items += await until(stream, PlaybackFinished)
            whole = items[-1]
            speaking = tasks.create_task(stream.push(sound(30.0)))
            items += await until(stream, PlaybackStarted)
            interrupted = await stream.interrupt()
            await speaking
            items += await until(stream, PlaybackFinished)
            cut = items[-1]
            wire.cut()
            await said(stream, sound(0.5))
            items += await until(stream, PlaybackFinished)
            await stream.close()
            items += [item async for item in stream]
    assert isinstance(whole, PlaybackFinished)
    assert (whole.position_s, whole.was_interrupted) == (2.5, False)
    assert isinstance(cut, PlaybackFinished)
    assert cut.was_interrupted
    assert interrupted.was_speaking
    assert cut.position_s == interrupted.position_s < 30
    frames = [item.index for item in items if isinstance(item, Frame)]
    assert frames == list(range(3, 3 + len(frames)))
    events = [item.number for item in items if not isinstance(item, Frame | Audio)]
    assert events == list(range(len(events)))
    assert sound(2.5) in b"".join(item.data for item in items if isinstance(item, Audio))
