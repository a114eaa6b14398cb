"""Every size that a client can choose has a limit, listed in docs/operations/security.md and enforced."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc.aio
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from grpc import StatusCode

from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import types_pb2 as types
from tests.contract.refusals import refused
from tests.product import Stub, new_session, opening, stream
from tests.test_operations import rows

SIZED = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)
LONG = "x" * 65
# What of gRPC's message beside the largest field there may be, and a little more than that.
OTHER_BYTES = (64 << 10) + 1


def sized(kind: Descriptor, path: str) -> Iterator[str]:
    """The fields of a message whose size a client chooses, at any depth."""
    for field in kind.fields:
        name = f"{path}.{field.name}"
        if field.is_repeated or field.type in SIZED:
            yield name
        elif field.message_type:
            yield from sized(field.message_type, name)


def test_every_size_is_listed() -> None:
    methods = pb.DESCRIPTOR.services_by_name["AvatarService"].methods
    fields = {name for method in methods for name in sized(method.input_type, method.name)}
    assert set(rows("Limits")) >= fields
    assert {name for name in rows("Limits") if name.partition(".")[0] in {each.name for each in methods}} == fields


@pytest.mark.parametrize(
    ("method", "request_", "reason"),
    [
        ("GetReference", pb.GetReferenceRequest(reference_id=LONG), "REFERENCE_NOT_FOUND"),
        ("DeleteReference", pb.DeleteReferenceRequest(reference_id=LONG), "REFERENCE_NOT_FOUND"),
        ("CreateSession", pb.CreateSessionRequest(reference_id=LONG), "REFERENCE_NOT_FOUND"),
        ("GetSession", pb.GetSessionRequest(session_id=LONG), "SESSION_NOT_FOUND"),
        ("UpdateSession", pb.UpdateSessionRequest(session=types.Session(id=LONG)), "SESSION_NOT_FOUND"),
        ("DeleteSession", pb.DeleteSessionRequest(session_id=LONG), "SESSION_NOT_FOUND"),
        ("Interrupt", pb.InterruptRequest(session_id=LONG), "SESSION_NOT_FOUND"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_name_that_is_too_long_is_not_found(stub: Stub, method: str, request_: Message, reason: str) -> None:
    call: Any = getattr(stub, method)
    async with refused(StatusCode.NOT_FOUND, reason):
        await call(request_, timeout=10)


async def test_a_stream_of_a_name_that_is_too_long_is_not_found(stub: Stub) -> None:
    async with refused(StatusCode.NOT_FOUND, "SESSION_NOT_FOUND"):
        await stream(stub, [opening(LONG)])


@pytest.mark.parametrize("paths", [["ttl", "prompt", "ttl"], ["ttl"] * 100_000, ["x" * 100_000]])
async def test_no_more_is_changed_than_can_change(stub: Stub, portrait: bytes, paths: list[str]) -> None:
    session = await new_session(stub, portrait)
    request = pb.UpdateSessionRequest(session=session, update_mask=FieldMask(paths=paths))
    async with refused(StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") as refusal:
        await stub.UpdateSession(request, timeout=10)
    assert refusal.fields == ["update_mask"]
    assert len(refusal.message) < 200


async def test_sound_over_the_limit_is_refused(stub: Stub, portrait: bytes) -> None:
    limit = (await stub.GetCapabilities(pb.GetCapabilitiesRequest(), timeout=10)).max_audio_bytes
    session = await new_session(stub, portrait)
    piece = pb.StreamAvatarRequest(audio=pb.AudioPiece(data=bytes(limit + 2)))
    async with refused(StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE") as refusal:
        await stream(stub, [opening(session.id), piece])
    assert str(limit) in refusal.message


async def test_a_message_larger_than_all_limits_is_not_read(stub: Stub) -> None:
    told = await stub.GetCapabilities(pb.GetCapabilitiesRequest(), timeout=10)
    size = max(told.max_picture_bytes, told.max_audio_bytes, told.max_prompt_bytes) + OTHER_BYTES
    unread = pb.UpdateSessionRequest(session=types.Session(reference_id="x" * size))
    for call in (
        stub.CreateReference(pb.CreateReferenceRequest(picture=bytes(size)), timeout=30),
        stub.UpdateSession(unread, timeout=30),
    ):
        with pytest.raises(grpc.aio.AioRpcError, match="RESOURCE_EXHAUSTED") as caught:
            await call
        assert "Received message larger than max" in (caught.value.details() or "")


async def test_metadata_over_the_limit_are_refused(stub: Stub) -> None:
    call = stub.GetCapabilities(pb.GetCapabilitiesRequest(), metadata=[("authorization", "x" * (16 << 10))], timeout=10)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is StatusCode.RESOURCE_EXHAUSTED
