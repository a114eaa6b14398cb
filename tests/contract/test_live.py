"""The rules of a live stream: it idles, speaks, falls silent and says so, on one clock."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from grpc import StatusCode

from avatar.aio import background
from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import types_pb2 as types
from tests.conftest import speech
from tests.contract.refusals import refused
from tests.product import (
    CLOSE,
    END_TURN,
    INTERRUPT,
    PCM16,
    Call,
    Streamed,
    Stub,
    answer,
    new_session,
    opening,
    pieces,
    stream,
)

LIVE = pb.OpenAvatar.MODE_LIVE


@dataclass
class Client:
    """A client of a live stream, which reads all the time."""

    call: Call
    opened: pb.AvatarOpened
    got: Streamed = field(default_factory=Streamed)
    order: list[str] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def read(self) -> None:
        while isinstance(response := await self.call.read(), pb.StreamAvatarResponse):
            self.got.take(response)
            part = response.WhichOneof("part")
            self.order.append(response.event.WhichOneof("kind") or "" if part == "event" else part or "")
            self.changed.set()

    async def say(self, data: bytes) -> None:
        for request in pieces(data, 1 << 15):
            await self.call.write(request)

    async def until(self, is_so: Callable[[Streamed], object]) -> None:
        async with asyncio.timeout(20):
            while not is_so(self.got):
                self.changed.clear()
                await self.changed.wait()

    @property
    def speech(self) -> list[types.VideoFrame]:
        return [frame for frame in self.got.frames if not frame.is_idle]


@asynccontextmanager
async def talking(stub: Stub, session_id: str, **options: Any) -> AsyncGenerator[Client, None]:
    call = stub.StreamAvatar(timeout=60)
    await call.write(opening(session_id, mode=LIVE, **options))
    client = Client(call, (await answer(call)).opened)
    async with background(client.read()):
        yield client
    call.cancel()


def kinds(got: Streamed) -> list[str]:
    return [event.WhichOneof("kind") or "" for event in got.events]


async def test_it_idles_in_time_until_there_is_speech(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    async with talking(stub, session.id) as client:
        await client.until(lambda got: len(got.frames) >= 9)
        started = asyncio.get_running_loop().time()
        await client.until(lambda got: len(got.frames) >= 33)
        elapsed_s = asyncio.get_running_loop().time() - started
        assert elapsed_s > 0.4, "idle blocks come in time, not ahead"
        assert all(frame.is_idle for frame in client.got.frames)
        await client.say(speech(0.48))
        await client.call.write(END_TURN)
        await client.until(lambda got: "playback_finished" in kinds(got))
        assert len(client.speech) == 12
        frames = client.got.frames
        assert [frame.index for frame in frames] == list(range(3, 3 + len(frames)))
        assert [frame.pts_us for frame in frames] == [frame.index * 40_000 for frame in frames]
        # It begins a block: blocks begin at whole numbers of twelve.
        assert client.speech[0].index % 12 == 0


async def test_a_turn_is_told_before_its_first_frame_and_after_its_last(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    async with talking(stub, session.id) as client:
        await client.say(speech(0.6))
        await client.call.write(END_TURN)
        await client.say(speech(0.3))
        await client.call.write(CLOSE)
        await client.until(lambda got: got.closed.num_blocks)
        finished = [event.playback_finished for event in client.got.events if event.HasField("playback_finished")]
        assert [(each.turn, each.position_us, each.interrupted) for each in finished] == [
            (0, 600_000, False),
            (1, 300_000, False),
        ]
        assert [event.number for event in client.got.events] == list(range(4))
        marks = [index for index, part in enumerate(client.order) if part.startswith("playback")]
        assert [client.order[index] for index in marks] == ["playback_started", "playback_finished"] * 2
        between = client.order[marks[0] + 1 : marks[1]]
        assert between == ["frame"] * 24, "two blocks of speech, and no idle one between"


async def test_frames_of_fast_speech_are_made_a_block_ahead_and_no_further(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    async with talking(stub, session.id) as client:
        await client.say(speech(10))
        await client.until(lambda got: "playback_started" in kinds(got))
        await asyncio.sleep(0.5)
        assert len(client.speech) <= 12 * 4
        await client.call.write(INTERRUPT)
        await client.until(lambda got: got.interrupted)
        told = client.got.interrupted[0]
        assert told.was_speaking
        assert told.next_frame == client.got.frames[-1].index + 1
        assert told.position_us == len(client.speech) * 40_000
        await client.until(lambda got: got.frames[-1].is_idle)
        index = client.order.index("interrupted")
        assert client.order[index - 1] == "playback_finished"
        finished = client.got.events[-1].playback_finished
        assert (finished.interrupted, finished.position_us, finished.next_frame) == (
            True,
            told.position_us,
            told.next_frame,
        )
        frames = client.got.frames
        assert [frame.index for frame in frames] == list(range(3, 3 + len(frames)))


async def test_an_interrupt_of_nobody_drops_nothing(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    async with talking(stub, session.id) as client:
        await client.until(lambda got: len(got.frames) >= 9)
        told = await stub.Interrupt(pb.InterruptRequest(session_id=session.id), timeout=10)
        assert (told.was_speaking, told.position_us) == (False, 0)
        assert not client.got.events


async def test_speech_beyond_what_is_taken_is_refused_in_whole_pieces(stub: Stub, portrait: bytes) -> None:
    most_s = (await stub.GetCapabilities(pb.GetCapabilitiesRequest(), timeout=10)).max_live_ahead_s
    session = await new_session(stub, portrait)
    async with talking(stub, session.id) as client:
        piece = pb.AudioPiece(data=bytes(2 * int(most_s * 10000)))
        for _ in range(2):
            await client.call.write(pb.StreamAvatarRequest(audio=piece))
        await client.until(lambda got: "notice" in kinds(got))
        notice = next(event.notice for event in client.got.events if event.HasField("notice"))
        assert (notice.kind, notice.num_samples) == (pb.Notice.KIND_AUDIO_REFUSED, int(most_s * 10000))
        await client.call.write(INTERRUPT)  # it is read all the same
        await client.until(lambda got: got.interrupted)
        assert client.got.interrupted[0].was_speaking


@pytest.mark.parametrize("rate_hz", [16000, 11025])
async def test_sound_comes_back_with_its_frames_as_it_was_sent(stub: Stub, portrait: bytes, rate_hz: int) -> None:
    session = await new_session(stub, portrait)
    format_ = types.AudioFormat(encoding=PCM16.encoding, rate_hz=rate_hz, num_channels=1)
    data = speech(1.5)[: 2 * rate_hz]  # one second
    requests = [opening(session.id, format_, return_audio=True), *pieces(data), CLOSE]
    streamed = await stream(stub, requests)
    assert [piece.pts_us for piece in streamed.audio] == [frame.pts_us for frame in streamed.frames]
    returned = b"".join(piece.data for piece in streamed.audio)
    frame_bytes = 2 * rate_hz // 25
    assert {len(piece.data) for piece in streamed.audio} == {frame_bytes}
    said = data[3 * frame_bytes :]
    assert returned == said + bytes(len(returned) - len(said))


async def test_frames_come_by_the_block_where_that_was_asked_for(stub: Stub, portrait: bytes) -> None:
    sessions = [await new_session(stub, portrait, seed=1) for _ in range(2)]
    output = types.VideoOutput(per_block=True)
    whole = await stream(stub, [opening(sessions[0].id, output=output), *pieces(speech(0.96)), CLOSE])
    single = await stream(stub, [opening(sessions[1].id), *pieces(speech(0.96)), CLOSE])
    assert whole.pixels == single.pixels
    assert [frame.index for frame in whole.frames] == list(range(3, 24))


async def test_an_encoding_that_cannot_be_had_is_refused_by_field(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    told = await stub.GetCapabilities(pb.GetCapabilitiesRequest(), timeout=10)
    assert types.VIDEO_ENCODING_RGB24 in told.encodings
    missing = [each for each in (*types.VideoEncoding.values()[1:], 77) if each not in told.encodings]
    for encoding in missing:
        output = types.VideoOutput(encoding=encoding)  # type: ignore[arg-type]
        async with refused(StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") as refusal:
            await stream(stub, [opening(session.id, output=output)])
        assert refusal.fields == ["open.output.encoding"]
    assert (await stream(stub, [opening(session.id), *pieces(speech(0.48)), CLOSE])).frames


async def test_the_promises_add_up(stub: Stub) -> None:
    told = await stub.GetCapabilities(pb.GetCapabilitiesRequest(), timeout=10)
    assert told.reaction_s > told.block_frames / told.video.frame_rate_hz + told.hold_s > told.hold_s > 0
    assert min(told.max_live_ahead_s, told.max_unread_s) > 0


async def test_a_prompt_cannot_be_changed_where_no_text_is_known(stub: Stub, portrait: bytes) -> None:
    if (await stub.GetCapabilities(pb.GetCapabilitiesRequest(), timeout=10)).prompts:
        return
    session = await new_session(stub, portrait)
    session.prompt = "a person who smiles"
    async with refused(StatusCode.FAILED_PRECONDITION, "PROMPT_UNSUPPORTED"):
        request = pb.UpdateSessionRequest(session=session, update_mask=FieldMask(paths=["prompt"]))
        await stub.UpdateSession(request, timeout=10)
