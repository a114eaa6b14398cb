"""The rules of the stream, one test each; after every refusal the next session is served."""

from __future__ import annotations

import asyncio
import struct

import pytest
from grpc import StatusCode

from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import types_pb2 as types
from tests.conftest import speech
from tests.contract.refusals import refused
from tests.product import CLOSE, END_TURN, PCM16, Stub, answer, frame, new_session, opening, pieces, rest, speak, stream

FLOAT32 = types.AudioFormat(encoding=types.SAMPLE_ENCODING_FLOAT32, rate_hz=16000, num_channels=1)


async def serves(stub: Stub, portrait: bytes) -> None:
    """A session of one block goes through."""
    session = await new_session(stub, portrait)
    assert len((await speak(stub, session.id, speech(0.48))).frames) == 9


async def test_frames_are_numbered_from_3_without_a_gap(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    streamed = await speak(stub, session.id, speech(1.5))
    assert [each.index for each in streamed.frames] == list(range(3, 48))
    assert [each.pts_us for each in streamed.frames] == [index * 40_000 for index in range(3, 48)]
    assert {len(each.data) for each in streamed.frames} == {3 * session.video.width * session.video.height}


async def test_close_is_answered_with_what_was_done(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    closed = (await speak(stub, session.id, speech(1))).closed
    num_levels = (await stub.GetCapabilities(pb.GetCapabilitiesRequest(), timeout=10)).num_levels
    assert (closed.num_frames, closed.num_blocks) == (33, 3)
    names = ["audio", *(f"denoiser-{level}" for level in range(num_levels)), "vae"]
    assert [stage.stage for stage in closed.stages] == names
    assert all(stage.num_blocks == 3 and stage.busy_s > 0 for stage in closed.stages)
    kept = (await stub.GetSession(pb.GetSessionRequest(session_id=session.id), timeout=10)).session
    assert (kept.state, kept.next_frame) == (types.Session.STATE_CLOSED, 36)


async def test_a_stream_without_sound_is_refused(stub: Stub, portrait: bytes) -> None:
    for requests in ([], [pb.StreamAvatarRequest(audio=pb.AudioPiece())]):
        session = await new_session(stub, portrait)
        async with refused(StatusCode.INVALID_ARGUMENT, "INVALID_AUDIO") as refusal:
            await stream(stub, [opening(session.id), *requests, CLOSE])
        assert refusal.fields == ["audio.data"]
    await serves(stub, portrait)


async def test_frames_come_before_the_sound_ends(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    call = stub.StreamAvatar(timeout=60)
    await call.write(opening(session.id))
    assert (await answer(call)).opened.session.state == types.Session.STATE_STREAMING
    for request in pieces(speech(2)):
        await call.write(request)
    assert (await frame(call)).index == 3
    call.cancel()


@pytest.mark.parametrize(
    ("rate_hz", "num_channels", "encoding"),
    [
        (8000, 1, types.SAMPLE_ENCODING_PCM16),
        (24000, 2, types.SAMPLE_ENCODING_FLOAT32),
        (44100, 2, types.SAMPLE_ENCODING_PCM16),
        (48000, 1, types.SAMPLE_ENCODING_FLOAT32),
    ],
)
async def test_sound_of_any_format_is_taken(
    stub: Stub,
    portrait: bytes,
    rate_hz: int,
    num_channels: int,
    encoding: types.SampleEncoding.ValueType,
) -> None:
    session = await new_session(stub, portrait)
    sample_bytes = 2 if encoding == types.SAMPLE_ENCODING_PCM16 else 4
    format_ = types.AudioFormat(encoding=encoding, rate_hz=rate_hz, num_channels=num_channels)
    data = bytes(rate_hz * num_channels * sample_bytes)  # one second
    streamed = await stream(stub, [opening(session.id, format_), *pieces(data, 4096), CLOSE])
    assert len(streamed.frames) == 33


async def test_the_stream_begins_with_open(stub: Stub, portrait: bytes) -> None:
    for first in (*pieces(bytes(64)), CLOSE, pb.StreamAvatarRequest()):
        async with refused(StatusCode.FAILED_PRECONDITION, "PROTOCOL_ORDER"):
            await stream(stub, [first])
    await serves(stub, portrait)


async def test_open_comes_exactly_once(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    async with refused(StatusCode.FAILED_PRECONDITION, "PROTOCOL_ORDER"):
        await stream(stub, [opening(session.id), *pieces(speech(1)), opening(session.id), CLOSE])
    await serves(stub, portrait)


async def test_an_unknown_session_cannot_stream(stub: Stub, portrait: bytes) -> None:
    async with refused(StatusCode.NOT_FOUND, "SESSION_NOT_FOUND"):
        await stream(stub, [opening("nobody")])
    await serves(stub, portrait)


async def test_a_session_has_one_stream(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    call = stub.StreamAvatar(timeout=60)
    await call.write(opening(session.id))
    await call.read()
    async with refused(StatusCode.FAILED_PRECONDITION, "SESSION_BUSY"):
        await stream(stub, [opening(session.id)])
    for request in [*pieces(speech(0.48)), CLOSE]:
        await call.write(request)
    parts = [response.WhichOneof("part") for response in await rest(call)]
    assert parts == ["event"] + ["frame"] * 9 + ["event", "closed"]


async def test_a_closed_session_cannot_stream_again(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    await speak(stub, session.id, speech(0.48))
    async with refused(StatusCode.FAILED_PRECONDITION, "SESSION_CLOSED"):
        await stream(stub, [opening(session.id)])


async def test_an_end_without_close_is_a_lost_connection(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    async with refused(StatusCode.CANCELLED, "CONNECTION_LOST"):
        await stream(stub, [opening(session.id), *pieces(speech(1))])
    kept = (await stub.GetSession(pb.GetSessionRequest(session_id=session.id), timeout=10)).session
    assert kept.state == types.Session.STATE_DETACHED
    async with refused(StatusCode.FAILED_PRECONDITION, "SESSION_BUSY"):
        await stream(stub, [opening(session.id)])
    await serves(stub, portrait)


@pytest.mark.parametrize(
    ("format_", "field"),
    [
        (types.AudioFormat(rate_hz=16000, num_channels=1), "open.audio.encoding"),
        (types.AudioFormat(encoding=PCM16.encoding, rate_hz=3000, num_channels=1), "open.audio.rate_hz"),
        (types.AudioFormat(encoding=PCM16.encoding, rate_hz=96000, num_channels=1), "open.audio.rate_hz"),
        (types.AudioFormat(encoding=PCM16.encoding, rate_hz=16000, num_channels=6), "open.audio.num_channels"),
        (types.AudioFormat(), "open.audio.encoding"),
    ],
    ids=["no encoding", "3 kHz", "96 kHz", "6 channels", "nothing"],
)
async def test_an_audio_format_that_cannot_be_used_is_refused_by_field(
    stub: Stub, portrait: bytes, format_: types.AudioFormat, field: str
) -> None:
    session = await new_session(stub, portrait)
    async with refused(StatusCode.INVALID_ARGUMENT, "INVALID_AUDIO") as refusal:
        await stream(stub, [opening(session.id, format_)])
    assert refusal.fields == [field]
    # The session is as it was: it can be streamed with a format that can be used.
    assert (await speak(stub, session.id, speech(0.48))).frames


@pytest.mark.parametrize(
    ("samples", "words"), [(float("nan"), "NaN"), (float("inf"), "infinity"), (3e4, "[-1, 1]")], ids=str
)
async def test_samples_that_are_no_sound_are_refused(stub: Stub, portrait: bytes, samples: float, words: str) -> None:
    session = await new_session(stub, portrait)
    good = bytes(4 * 16000)
    bad = struct.pack("<f", samples) * 640
    async with refused(StatusCode.INVALID_ARGUMENT, "INVALID_AUDIO") as refusal:
        await stream(stub, [opening(session.id, FLOAT32), *pieces(good), *pieces(bad), CLOSE])
    assert refusal.fields == ["audio.data"]
    assert words in refusal.message
    await serves(stub, portrait)


async def test_half_a_sample_is_refused(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    async with refused(StatusCode.INVALID_ARGUMENT, "INVALID_AUDIO") as refusal:
        await stream(stub, [opening(session.id), *pieces(bytes(1281), 1281)])
    assert refusal.fields == ["audio.data"]
    await serves(stub, portrait)


async def test_a_message_over_the_limit_is_refused(stub: Stub, portrait: bytes) -> None:
    limit = (await stub.GetCapabilities(pb.GetCapabilitiesRequest(), timeout=10)).max_audio_bytes
    session = await new_session(stub, portrait)
    async with refused(StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE") as refusal:
        await stream(stub, [opening(session.id), *pieces(bytes(limit + 2), limit + 2)])
    assert str(limit) in refusal.message
    await serves(stub, portrait)


async def test_a_deleted_session_stops_streaming(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)

    async def delete_then_speak() -> None:
        call = stub.StreamAvatar(timeout=60)
        await call.write(opening(session.id))
        await call.read()
        await stub.DeleteSession(pb.DeleteSessionRequest(session_id=session.id), timeout=10)
        await rest(call)

    async with refused(StatusCode.NOT_FOUND, "SESSION_NOT_FOUND"):
        await delete_then_speak()
    await serves(stub, portrait)


async def test_an_interrupt_drops_what_was_said_and_keeps_numbers_whole(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    interrupt = pb.StreamAvatarRequest(interrupt=pb.InterruptAvatar())
    requests = [opening(session.id), *pieces(speech(0.96)), interrupt, *pieces(speech(0.96)), CLOSE]
    streamed = await stream(stub, requests)
    assert len(streamed.interrupted) == 1
    assert [each.index for each in streamed.frames] == list(range(3, 3 + len(streamed.frames)))
    # What was said after it is shown in full, two blocks; of what was said before at most what had been sent.
    before = streamed.interrupted[0].next_frame - 3
    assert len(streamed.frames) - before in (21, 24)


async def test_an_interrupt_from_elsewhere_says_what_was_shown(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    call = stub.StreamAvatar(timeout=60)
    await call.write(opening(session.id))
    await call.read()
    for request in pieces(speech(1.92)):
        await call.write(request)
    assert (await frame(call)).index == 3
    interrupted = await stub.Interrupt(pb.InterruptRequest(session_id=session.id), timeout=10)
    await call.write(CLOSE)
    indexes = [response.frame.index for response in await rest(call) if response.WhichOneof("part") == "frame"]
    assert interrupted.next_frame > 3
    assert indexes == list(range(4, interrupted.next_frame)), "frames were sent after the interrupt"


async def test_many_sessions_stream_at_a_time(stub: Stub, portrait: bytes) -> None:
    sessions = [await new_session(stub, portrait, seed=1) for _ in range(3)]
    streamed = await asyncio.gather(*(speak(stub, session.id, speech(0.96)) for session in sessions))
    assert streamed[0].pixels == streamed[1].pixels == streamed[2].pixels


async def test_every_turn_has_an_end_however_many_come_at_once(stub: Stub, portrait: bytes) -> None:
    """There are more than wait at a time, and than are kept."""
    session = await new_session(stub, portrait)
    call = stub.StreamAvatar(timeout=60)
    await call.write(opening(session.id))
    await answer(call)
    for _ in range(2500):
        await call.write(END_TURN)
    for request in [*pieces(speech(0.5)), CLOSE]:
        await call.write(request)
    turns = [each.event.playback_finished.turn for each in await rest(call) if each.HasField("event")]
    assert turns[:2500] == list(range(2500))
