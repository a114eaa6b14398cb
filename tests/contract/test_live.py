"""The rules of a live stream: one clock for idling and speech, events of each turn, and bounded speech ahead."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from avatar.aio import background
from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import types_pb2 as types
from tests.blocks import BLOCK_FRAMES, end_frame
from tests.conftest import speech
from tests.product import (
    CLOSE,
    END_TURN,
    INTERRUPT,
    PCM16,
    Call,
    Streamed,
    Stub,
    new_session,
    open_stream,
    opening,
    pieces,
    send,
    stream,
)

LIVE = pb.OpenAvatar.MODE_LIVE


@dataclass
class Client:
    """A live stream that is read continuously. parts: the kind of each message, for events that of the event."""

    call: Call
    streamed: Streamed = field(default_factory=Streamed)
    parts: list[str] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def read(self) -> None:
        async for response in self.call:
            self.streamed.add(response)
            part = response.WhichOneof("part")
            self.parts.append(response.event.WhichOneof("kind") or "" if part == "event" else part or "")
            self.changed.set()

    async def say(self, data: bytes) -> None:
        await send(self.call, pieces(data, 1 << 15))

    async def until(self, condition: Callable[[Streamed], object]) -> None:
        async with asyncio.timeout(20):
            while not condition(self.streamed):
                self.changed.clear()
                await self.changed.wait()

    @property
    def speech(self) -> list[types.VideoFrame]:
        return [frame for frame in self.streamed.frames if not frame.is_idle]


@asynccontextmanager
async def live_stream(stub: Stub, session_id: str) -> AsyncGenerator[Client, None]:
    call, _ = await open_stream(stub, session_id, mode=LIVE)
    client = Client(call)
    async with background(client.read()):
        yield client
    call.cancel()


def kinds(streamed: Streamed) -> list[str]:
    return [event.WhichOneof("kind") or "" for event in streamed.events]


async def test_a_stream_without_speech_idles_in_real_time(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    async with live_stream(stub, session.id) as client:
        await client.until(lambda streamed: len(streamed.frames) >= 9)
        started = asyncio.get_running_loop().time()
        await client.until(lambda streamed: len(streamed.frames) >= 33)
        elapsed_s = asyncio.get_running_loop().time() - started
        assert elapsed_s > 0.4, "idle blocks are not sent ahead of time"
        assert all(frame.is_idle for frame in client.streamed.frames)
        await client.say(speech(0.48))
        await client.call.write(END_TURN)
        await client.until(lambda streamed: "playback_finished" in kinds(streamed))
        assert len(client.speech) == end_frame(0.48)
        frames = client.streamed.frames
        assert client.streamed.indexes == list(range(3, 3 + len(frames)))
        assert [frame.pts_us for frame in frames] == [frame.index * 40_000 for frame in frames]
        assert client.speech[0].index % BLOCK_FRAMES == 0, "speech starts with a block"


async def test_a_turns_events_enclose_its_frames(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    async with live_stream(stub, session.id) as client:
        await client.say(speech(0.6))
        await client.call.write(END_TURN)
        await client.say(speech(0.3))
        await client.call.write(CLOSE)
        await client.until(lambda streamed: streamed.closed.num_blocks)
        events = client.streamed.events
        finished = [event.playback_finished for event in events if event.HasField("playback_finished")]
        assert [(each.turn, each.position_us, each.interrupted) for each in finished] == [
            (0, 600_000, False),
            (1, 300_000, False),
        ]
        assert [event.number for event in events] == list(range(4))
        marks = [index for index, part in enumerate(client.parts) if part.startswith("playback")]
        assert [client.parts[index] for index in marks] == ["playback_started", "playback_finished"] * 2
        between = client.parts[marks[0] + 1 : marks[1]]
        assert between == ["frame"] * end_frame(0.6), "blocks of speech, and no idle one between"


async def test_fast_speech_is_made_at_most_a_few_blocks_ahead(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    async with live_stream(stub, session.id) as client:
        await client.say(speech(10))
        await client.until(lambda streamed: "playback_started" in kinds(streamed))
        await asyncio.sleep(0.5)
        assert len(client.speech) <= 12 * 4
        await client.call.write(INTERRUPT)
        await client.until(lambda streamed: streamed.interrupted)
        interrupted = client.streamed.interrupted[0]
        assert interrupted.was_speaking
        assert interrupted.next_frame == client.streamed.indexes[-1] + 1
        assert interrupted.position_us == len(client.speech) * 40_000
        await client.until(lambda streamed: streamed.frames[-1].is_idle)
        assert client.parts[client.parts.index("interrupted") - 1] == "playback_finished"
        finished = client.streamed.events[-1].playback_finished
        assert finished.interrupted
        assert (finished.position_us, finished.next_frame) == (interrupted.position_us, interrupted.next_frame)
        assert client.streamed.indexes == list(range(3, 3 + len(client.streamed.frames)))


async def test_an_interrupt_without_speech_drops_nothing(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    async with live_stream(stub, session.id) as client:
        await client.until(lambda streamed: len(streamed.frames) >= 9)
        interrupted = await stub.Interrupt(pb.InterruptRequest(session_id=session.id), timeout=10)
        assert (interrupted.was_speaking, interrupted.position_us) == (False, 0)
        assert not client.streamed.events


async def test_speech_over_the_limit_ahead_is_refused_by_the_piece(
    stub: Stub, portrait: bytes, capabilities: pb.GetCapabilitiesResponse
) -> None:
    num_samples = int(capabilities.max_live_ahead_s * 10000)  # of two such pieces at 16 kHz, the second is too much
    session = await new_session(stub, portrait)
    async with live_stream(stub, session.id) as client:
        await send(client.call, [*pieces(bytes(2 * num_samples), 2 * num_samples)] * 2)
        await client.until(lambda streamed: "notice" in kinds(streamed))
        notice = next(event.notice for event in client.streamed.events if event.HasField("notice"))
        assert (notice.kind, notice.num_samples) == (pb.Notice.KIND_AUDIO_REFUSED, num_samples)
        await client.call.write(INTERRUPT)  # other messages are still received
        await client.until(lambda streamed: streamed.interrupted)
        assert client.streamed.interrupted[0].was_speaking


@pytest.mark.parametrize("rate_hz", [16000, 11025])
async def test_audio_is_returned_with_its_frames_unchanged(stub: Stub, portrait: bytes, rate_hz: int) -> None:
    session = await new_session(stub, portrait)
    format_ = types.AudioFormat(encoding=PCM16.encoding, rate_hz=rate_hz, num_channels=1)
    data = speech(1.5)[: 2 * rate_hz]  # one second
    requests = [opening(session.id, format_, return_audio=True), *pieces(data), CLOSE]
    streamed = await stream(stub, requests)
    assert [piece.pts_us for piece in streamed.audio] == [frame.pts_us for frame in streamed.frames]
    returned = b"".join(piece.data for piece in streamed.audio)
    frame_bytes = 2 * rate_hz // 25
    assert {len(piece.data) for piece in streamed.audio} == {frame_bytes}
    sent = data[3 * frame_bytes :]
    assert returned == sent + bytes(len(returned) - len(sent))
