"""Every size that a client can choose has a limit, listed in docs/operations/security.md and enforced."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc.aio
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.field_mask_pb2 import FieldMask

from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import types_pb2 as types
from tests.product import Stub, new_session
from tests.refusals import refused
from tests.test_operations import rows

SIZED = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)
# More than a gRPC message may hold beside its largest field.
OTHER_BYTES = (64 << 10) + 1


def sized(kind: Descriptor, path: str) -> Iterator[str]:
    """Yield the fields of a message, at any depth, whose size a client chooses."""
    for field in kind.fields:
        name = f"{path}.{field.name}"
        if field.is_repeated or field.type in SIZED:
            yield name
        elif field.message_type:
            yield from sized(field.message_type, name)


def test_the_documentation_lists_every_size() -> None:
    methods = pb.DESCRIPTOR.services_by_name["AvatarService"].methods
    fields = {name for method in methods for name in sized(method.input_type, method.name)}
    listed = set(rows("Limits"))
    assert {name for name in listed if name.partition(".")[0] in {each.name for each in methods}} == fields


async def test_a_name_over_the_limit_is_not_found(stub: Stub) -> None:
    name = "x" * 65
    calls: list[Any] = [
        stub.GetReference(pb.GetReferenceRequest(reference_id=name), timeout=10),
        stub.DeleteReference(pb.DeleteReferenceRequest(reference_id=name), timeout=10),
        stub.CreateSession(pb.CreateSessionRequest(reference_id=name), timeout=10),
        stub.GetSession(pb.GetSessionRequest(session_id=name), timeout=10),
        stub.UpdateSession(pb.UpdateSessionRequest(session=types.Session(id=name)), timeout=10),
        stub.DeleteSession(pb.DeleteSessionRequest(session_id=name), timeout=10),
        stub.Interrupt(pb.InterruptRequest(session_id=name), timeout=10),
    ]
    for index, call in enumerate(calls):
        async with refused("REFERENCE_NOT_FOUND" if index < 3 else "SESSION_NOT_FOUND"):
            await call


@pytest.mark.parametrize("paths", [["ttl", "prompt", "ttl"], ["ttl"] * 100_000, ["x" * 100_000]])
async def test_an_update_mask_over_the_limit_is_refused(stub: Stub, portrait: bytes, paths: list[str]) -> None:
    session = await new_session(stub, portrait)
    request = pb.UpdateSessionRequest(session=session, update_mask=FieldMask(paths=paths))
    async with refused("INVALID_FIELD") as refusal:
        await stub.UpdateSession(request, timeout=10)
    assert refusal.fields == ["update_mask"]
    assert len(refusal.message) < 200


async def test_a_message_over_all_limits_is_not_read(stub: Stub, capabilities: pb.GetCapabilitiesResponse) -> None:
    limits = (capabilities.max_picture_bytes, capabilities.max_audio_bytes, capabilities.max_prompt_bytes)
    size = max(limits) + OTHER_BYTES
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
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
