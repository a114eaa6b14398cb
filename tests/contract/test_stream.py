"""The rules of a stream. After every refusal the gateway serves the next session."""

from __future__ import annotations

import struct

import pytest

from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import types_pb2 as types
from tests.blocks import BLOCK_FRAMES, BLOCK_S, FIRST_FRAME, end_frame, whole_blocks
from tests.conftest import speech
from tests.product import (
    CLOSE,
    END_TURN,
    INTERRUPT,
    PCM16,
    Stub,
    finish,
    frame,
    new_session,
    open_stream,
    opening,
    pieces,
    rest,
    send,
    speak,
    stream,
)
from tests.refusals import refused

FLOAT32 = types.AudioFormat(encoding=types.SAMPLE_ENCODING_FLOAT32, rate_hz=16000, num_channels=1)


async def assert_serves(stub: Stub, portrait: bytes) -> None:
    """Stream a session of one block."""
    session = await new_session(stub, portrait)
    assert len((await speak(stub, session.id, speech(BLOCK_S))).frames) == BLOCK_FRAMES - FIRST_FRAME


async def test_frames_are_numbered_from_3_without_a_gap(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    streamed = await speak(stub, session.id, speech(1.5))
    assert streamed.indexes == list(range(3, end_frame(1.5)))
    assert [each.pts_us for each in streamed.frames] == [index * 40_000 for index in range(3, end_frame(1.5))]
    assert {len(each.data) for each in streamed.frames} == {3 * session.video.width * session.video.height}


async def test_closed_reports_frames_blocks_and_stages(
    stub: Stub, portrait: bytes, capabilities: pb.GetCapabilitiesResponse
) -> None:
    session = await new_session(stub, portrait)
    closed = (await speak(stub, session.id, speech(1))).closed
    assert (closed.num_frames, closed.num_blocks) == (end_frame(1) - FIRST_FRAME, whole_blocks(1))
    names = ["audio", *(f"denoiser-{level}" for level in range(capabilities.num_levels)), "vae"]
    assert [stage.stage for stage in closed.stages] == names
    assert all(stage.num_blocks == whole_blocks(1) and stage.busy_s > 0 for stage in closed.stages)
    kept = (await stub.GetSession(pb.GetSessionRequest(session_id=session.id), timeout=10)).session
    assert (kept.state, kept.next_frame) == (types.Session.STATE_CLOSED, end_frame(1))
    async with refused("SESSION_CLOSED"):
        await open_stream(stub, session.id)


async def test_a_stream_without_audio_is_refused(stub: Stub, portrait: bytes) -> None:
    for requests in ([], [pb.StreamAvatarRequest(audio=pb.AudioPiece())]):
        session = await new_session(stub, portrait)
        async with refused("INVALID_AUDIO") as refusal:
            await stream(stub, [opening(session.id), *requests, CLOSE])
        assert refusal.fields == ["audio.data"]
    await assert_serves(stub, portrait)


async def test_frames_arrive_before_the_audio_ends(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    call, opened = await open_stream(stub, session.id)
    assert opened.session.state == types.Session.STATE_STREAMING
    await send(call, pieces(speech(2)))
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
async def test_audio_of_any_format_is_accepted(
    stub: Stub, portrait: bytes, rate_hz: int, num_channels: int, encoding: types.SampleEncoding.ValueType
) -> None:
    session = await new_session(stub, portrait)
    sample_bytes = 2 if encoding == types.SAMPLE_ENCODING_PCM16 else 4
    format_ = types.AudioFormat(encoding=encoding, rate_hz=rate_hz, num_channels=num_channels)
    data = bytes(rate_hz * num_channels * sample_bytes)  # one second
    streamed = await stream(stub, [opening(session.id, format_), *pieces(data, 4096), CLOSE])
    assert len(streamed.frames) == end_frame(1) - FIRST_FRAME


async def test_the_first_message_is_open(stub: Stub, portrait: bytes) -> None:
    for first in (*pieces(bytes(64)), CLOSE, pb.StreamAvatarRequest()):
        async with refused("PROTOCOL_ORDER"):
            await stream(stub, [first])
    await assert_serves(stub, portrait)


async def test_a_second_open_is_refused(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    async with refused("PROTOCOL_ORDER"):
        await stream(stub, [opening(session.id), *pieces(speech(1)), opening(session.id), CLOSE])
    await assert_serves(stub, portrait)


@pytest.mark.parametrize("session_id", ["nobody", "x" * 65])
async def test_an_unknown_session_cannot_stream(stub: Stub, portrait: bytes, session_id: str) -> None:
    async with refused("SESSION_NOT_FOUND"):
        await open_stream(stub, session_id)
    await assert_serves(stub, portrait)


async def test_a_session_has_one_stream(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    call, _ = await open_stream(stub, session.id)
    async with refused("SESSION_BUSY"):
        await open_stream(stub, session.id)
    await send(call, [*pieces(speech(0.48)), CLOSE])
    parts = [response.WhichOneof("part") for response in await rest(call)]
    assert parts == ["event"] + ["frame"] * (end_frame(0.48) - FIRST_FRAME) + ["event", "closed"]


async def test_an_end_without_close_is_a_lost_connection(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    async with refused("CONNECTION_LOST"):
        await stream(stub, [opening(session.id), *pieces(speech(1))])
    kept = (await stub.GetSession(pb.GetSessionRequest(session_id=session.id), timeout=10)).session
    assert kept.state == types.Session.STATE_DETACHED
    async with refused("SESSION_BUSY"):
        await open_stream(stub, session.id)
    await assert_serves(stub, portrait)


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
async def test_an_unsupported_audio_format_is_refused_with_its_field(
    stub: Stub, portrait: bytes, format_: types.AudioFormat, field: str
) -> None:
    session = await new_session(stub, portrait)
    async with refused("INVALID_AUDIO") as refusal:
        await open_stream(stub, session.id, audio=format_)
    assert refusal.fields == [field]
    # The session is unchanged: it can be streamed with a supported format.
    assert (await speak(stub, session.id, speech(0.48))).frames


@pytest.mark.parametrize(
    ("samples", "words"), [(float("nan"), "NaN"), (float("inf"), "infinity"), (3e4, "[-1, 1]")], ids=str
)
async def test_samples_out_of_range_are_refused(stub: Stub, portrait: bytes, samples: float, words: str) -> None:
    session = await new_session(stub, portrait)
    good = bytes(4 * 16000)
    bad = struct.pack("<f", samples) * 640
    async with refused("INVALID_AUDIO") as refusal:
        await stream(stub, [opening(session.id, FLOAT32), *pieces(good), *pieces(bad), CLOSE])
    assert refusal.fields == ["audio.data"]
    assert words in refusal.message
    await assert_serves(stub, portrait)


async def test_half_a_sample_is_refused(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    async with refused("INVALID_AUDIO") as refusal:
        await stream(stub, [opening(session.id), *pieces(bytes(1281), 1281)])
    assert refusal.fields == ["audio.data"]
    await assert_serves(stub, portrait)


async def test_a_piece_over_the_limit_is_refused(
    stub: Stub, portrait: bytes, capabilities: pb.GetCapabilitiesResponse
) -> None:
    limit = capabilities.max_audio_bytes
    session = await new_session(stub, portrait)
    async with refused("MESSAGE_TOO_LARGE") as refusal:
        await stream(stub, [opening(session.id), *pieces(bytes(limit + 2), limit + 2)])
    assert str(limit) in refusal.message
    await assert_serves(stub, portrait)


async def test_deleting_a_session_ends_its_stream(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    call, _ = await open_stream(stub, session.id)
    await stub.DeleteSession(pb.DeleteSessionRequest(session_id=session.id), timeout=10)
    async with refused("SESSION_NOT_FOUND"):
        await rest(call)
    await assert_serves(stub, portrait)


async def test_an_interrupt_drops_earlier_speech_and_leaves_no_gap(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    requests = [opening(session.id), *pieces(speech(0.96)), INTERRUPT, *pieces(speech(0.96)), CLOSE]
    streamed = await stream(stub, requests)
    assert len(streamed.interrupted) == 1
    assert streamed.indexes == list(range(3, 3 + len(streamed.frames)))
    # Speech after the interrupt gives all of its two blocks; speech before it only those that were sent by then.
    before = streamed.interrupted[0].next_frame - 3
    assert len(streamed.frames) - before in (21, 24)


async def test_an_interrupt_by_another_call_returns_the_next_frame(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    call, _ = await open_stream(stub, session.id)
    await send(call, pieces(speech(1.92)))
    assert (await frame(call)).index == 3
    interrupted = await stub.Interrupt(pb.InterruptRequest(session_id=session.id), timeout=10)
    streamed = await finish(call)
    assert interrupted.next_frame > 3
    assert streamed.indexes == list(range(4, interrupted.next_frame)), "frames were sent after the interrupt"


async def test_every_turn_ends_even_if_thousands_end_at_once(stub: Stub, portrait: bytes) -> None:
    """More turns end than may be queued and than may be kept for a resumption."""
    session = await new_session(stub, portrait)
    call, _ = await open_stream(stub, session.id)
    streamed = await finish(call, [*[END_TURN] * 2500, *pieces(speech(0.5)), CLOSE])
    turns = [event.playback_finished.turn for event in streamed.events]
    assert turns[:2500] == list(range(2500))
