"""Sessions: what they are made of, and what is refused."""

from __future__ import annotations

from typing import Any

import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from grpc import StatusCode

from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import types_pb2 as types
from tests.contract.refusals import refused
from tests.product import Stub, new_session


async def test_capabilities_say_what_a_client_needs(stub: Stub) -> None:
    told = await stub.GetCapabilities(pb.GetCapabilitiesRequest(), timeout=10)
    assert told.video.frame_rate_hz == 25
    assert (told.video.width > 0 and told.video.height > 0) or told.sizes_free
    assert (told.min_rate_hz, told.max_rate_hz) == (8000, 48000)
    assert told.block_frames == 12
    assert told.num_levels > 0
    assert min(told.max_picture_bytes, told.max_audio_bytes, told.max_audio_ahead_s) > 0


async def test_a_session_is_what_was_asked_for(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait, seed=12345, ttl=Duration(seconds=77))
    assert session.seed == 12345
    assert session.ttl.seconds == 77
    assert session.state == types.Session.STATE_IDLE
    assert session.next_frame == 3
    assert session.video.frame_rate_hz == 25
    kept = (await stub.GetSession(pb.GetSessionRequest(session_id=session.id), timeout=10)).session
    assert (kept.id, kept.seed, kept.reference_id) == (session.id, session.seed, session.reference_id)


async def test_a_session_tells_what_it_has_chosen_and_nothing_else(stub: Stub, portrait: bytes) -> None:
    chosen = {"sink_update_block": 0, "min_sink_distance": 4, "max_sink_distance": 4}
    session = await new_session(stub, portrait, **chosen)
    assert {name: getattr(session, name) for name in chosen} == chosen
    assert session.HasField("sink_update_block")
    assert not session.HasField("audio_context")
    plain = await new_session(stub, portrait)
    assert not any(plain.HasField(name) for name in chosen)  # type: ignore[arg-type]


async def test_ids_and_seeds_that_are_not_given_are_drawn(stub: Stub, portrait: bytes) -> None:
    sessions = [await new_session(stub, portrait) for _ in range(3)]
    assert len({session.id for session in sessions}) == 3
    assert len({session.seed for session in sessions}) == 3
    assert min(len(session.id) for session in sessions) >= 32


@pytest.mark.parametrize("session_id", ["", "nobody", "../../x", "a" * 10_000])
async def test_an_unknown_session_is_not_found(stub: Stub, session_id: str) -> None:
    async with refused(StatusCode.NOT_FOUND, "SESSION_NOT_FOUND"):
        await stub.GetSession(pb.GetSessionRequest(session_id=session_id), timeout=10)
    async with refused(StatusCode.NOT_FOUND, "SESSION_NOT_FOUND"):
        await stub.Interrupt(pb.InterruptRequest(session_id=session_id), timeout=10)
    async with refused(StatusCode.NOT_FOUND, "SESSION_NOT_FOUND"):
        await stub.DeleteSession(pb.DeleteSessionRequest(session_id=session_id), timeout=10)


async def test_an_unknown_reference_is_not_found(stub: Stub) -> None:
    async with refused(StatusCode.NOT_FOUND, "REFERENCE_NOT_FOUND"):
        await stub.CreateSession(pb.CreateSessionRequest(reference_id="nothing"), timeout=10)


async def test_a_prompt_is_refused_where_no_text_is_known(stub: Stub, portrait: bytes) -> None:
    if (await stub.GetCapabilities(pb.GetCapabilitiesRequest(), timeout=10)).prompts:
        return
    async with refused(StatusCode.FAILED_PRECONDITION, "PROMPT_UNSUPPORTED"):
        await new_session(stub, portrait, prompt="a person who smiles")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"seed": 1 << 63}, "seed"),
        ({"ttl": Duration(nanos=1)}, "ttl"),
        ({"ttl": Duration(seconds=1 << 40)}, "ttl"),
        ({"ttl": Duration(seconds=1, nanos=2_000_000_000)}, "ttl"),
        ({"min_sink_distance": 4}, "min_sink_distance"),
        ({"min_sink_distance": 5, "max_sink_distance": 4}, "min_sink_distance"),
        ({"audio_context": Duration(nanos=30_000_000)}, "audio_context"),
        ({"audio_context": Duration(seconds=-1)}, "audio_context"),
        ({"audio_context": Duration(seconds=60)}, "audio_context"),
    ],
    ids=["seed", "short ttl", "long ttl", "no duration", "half a range", "no range", "odd", "negative", "far"],
)
async def test_a_field_out_of_range_is_refused_by_name(
    stub: Stub, portrait: bytes, fields: dict[str, object], field: str
) -> None:
    async with refused(StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") as refusal:
        await new_session(stub, portrait, **fields)
    assert refusal.fields == [field]


async def test_the_time_to_live_can_be_changed_and_nothing_else(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    session.ttl.FromSeconds(55)
    request = pb.UpdateSessionRequest(session=session, update_mask=FieldMask(paths=["ttl"]))
    assert (await stub.UpdateSession(request, timeout=10)).session.ttl.seconds == 55
    async with refused(StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") as refusal:
        other = pb.UpdateSessionRequest(session=session, update_mask=FieldMask(paths=["seed"]))
        await stub.UpdateSession(other, timeout=10)
    assert refusal.fields == ["update_mask"]


async def test_a_deleted_session_is_gone(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    await stub.DeleteSession(pb.DeleteSessionRequest(session_id=session.id), timeout=10)
    async with refused(StatusCode.NOT_FOUND, "SESSION_NOT_FOUND"):
        await stub.GetSession(pb.GetSessionRequest(session_id=session.id), timeout=10)


@pytest.mark.parametrize("method", ["CreateSession", "StreamAvatar"])
async def test_bytes_that_are_no_message_are_refused(target: str, method: str) -> None:
    async with grpc.aio.insecure_channel(target) as channel:
        path = f"/avatar.v1.AvatarService/{method}"
        async with refused(StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") as refusal:
            if method == "StreamAvatar":
                call: Any = channel.stream_stream(path)()
                await call.write(b"\xff\xff")
                await call.read()
            else:
                unary: Any = channel.unary_unary(path)
                await unary(b"\xff\xff", timeout=10)
    assert refusal.fields == ["request"]


async def test_only_a_streaming_session_can_be_interrupted(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    async with refused(StatusCode.FAILED_PRECONDITION, "NOT_STREAMING"):
        await stub.Interrupt(pb.InterruptRequest(session_id=session.id), timeout=10)
