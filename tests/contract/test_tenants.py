"""Tenants: every call needs a token, and one tenant cannot detect the sessions and references of another."""

from __future__ import annotations

import base64
import hashlib
import logging
import secrets
from collections.abc import Iterator
from io import StringIO
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from avatar.telemetry import log_formatter
from avatar.v1 import avatar_service_pb2 as pb
from tests.blocks import FIRST_FRAME, end_frame
from tests.conftest import speech
from tests.contract.tenants import ACME, TenantGateway
from tests.product import PCM16, Stub, answer, new_reference, new_session, open_stream, opening, speak, stream
from tests.refusals import Refusal, refused

METHODS: list[MethodDescriptor] = list(pb.DESCRIPTOR.services_by_name["AvatarService"].methods)
# Other fields that a valid request needs, besides names. A new method may have none.
OTHER_FIELDS: dict[str, dict[str, Any]] = {
    "UpdateSession": {"session": {"ttl": {"seconds": 60}}, "update_mask": {"paths": ["ttl"]}},
    "StreamAvatar": {"open": {"audio": PCM16}},
}


async def call(stub: Stub, method: MethodDescriptor, request: Message) -> Any:
    """Call a method and return its first answer."""
    made = getattr(stub, method.name)
    if not method.client_streaming:
        return await made(request, timeout=30)
    stream = made(timeout=30)
    await stream.write(request)
    answer = await stream.read()
    stream.cancel()
    return answer


async def status_of(stub: Stub, method: MethodDescriptor, request: Message) -> StatusCode:
    """Return the status that a call ends with."""
    try:
        await call(stub, method, request)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return StatusCode.OK


def request_for(method: MethodDescriptor, session_id: str, reference_id: str) -> tuple[Message, int]:
    """Return a request with these names and otherwise valid, and the number of names that it holds."""
    request: Message = GetMessageClass(method.input_type)(**OTHER_FIELDS.get(method.name, {}))
    return request, name_all(request, {"session_id": session_id, "reference_id": reference_id})


def name_all(message: Message, names: dict[str, str]) -> int:
    """Set each field for a name, at any depth, and the first such field of a oneof. Return how many there are."""
    num_named = 0
    for field in message.DESCRIPTOR.fields:
        key = field.name if field.name != "id" else f"{message.DESCRIPTOR.name.lower()}_id"
        if field.type == FieldDescriptor.TYPE_STRING and key in names:
            setattr(message, field.name, names[key])
            num_named += 1
        elif field.message_type and field.message_type.file.package == "avatar.v1" and not field.is_repeated:
            if field.containing_oneof and message.WhichOneof(field.containing_oneof.name) not in (None, field.name):
                continue
            kind: Any = field.message_type
            if name_all(GetMessageClass(kind)(), names):
                num_named += name_all(getattr(message, field.name), names)
    return num_named


def named() -> Iterator[MethodDescriptor]:
    """Yield the methods whose requests hold a name."""
    return (method for method in METHODS if request_for(method, "x", "x")[1])


def test_all_methods_but_two_take_a_name() -> None:
    assert {method.name for method in METHODS} - {method.name for method in named()} == {
        "GetCapabilities",
        "CreateReference",
    }


async def test_every_method_needs_a_token(tenant_gateway: TenantGateway) -> None:
    for token in (None, "", "another token", hashlib.sha256(ACME.encode()).hexdigest()):
        async with tenant_gateway.connected(token) as stub:
            for method in METHODS:
                async with refused("UNAUTHENTICATED"):
                    await call(stub, method, GetMessageClass(method.input_type)())


async def test_calls_of_unknown_methods_are_not_measured(
    tenant_gateway: TenantGateway, measured: InMemoryMetricReader
) -> None:
    async with grpc.aio.secure_channel(tenant_gateway.target, tenant_gateway.trust) as channel:
        known: Any = channel.unary_unary("/avatar.v1.AvatarService/GetCapabilities")
        invented: Any = channel.unary_unary("/avatar.v1.AvatarService/Invented")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await invented(b"", timeout=10)
        assert caught.value.code() is StatusCode.UNIMPLEMENTED
        with pytest.raises(grpc.aio.AioRpcError):
            await known(b"", timeout=10)
    data = measured.get_metrics_data()
    assert data
    measurements = data.to_json()
    assert "/avatar.v1.AvatarService/GetCapabilities" in measurements
    assert "Invented" not in measurements


WRONG = [
    [("authorization", ACME)],
    [("authorization", f"Basic {ACME}")],
    [("authorization", "Bearer")],
    [("authorization", f"Bearer  {ACME}")],
    [("authorization", f"Bearer {ACME}"), ("authorization", f"Bearer {ACME}")],
    [("x-authorization", f"Bearer {ACME}")],
]


async def test_authorization_is_one_bearer_token(tenant_gateway: TenantGateway) -> None:
    async with tenant_gateway.connected(None) as stub:
        for metadata in WRONG:
            async with refused("UNAUTHENTICATED"):
                await stub.GetCapabilities(pb.GetCapabilitiesRequest(), metadata=metadata, timeout=10)
        good = [("authorization", f"bearer {ACME}")]
        assert await stub.GetCapabilities(pb.GetCapabilitiesRequest(), metadata=good, timeout=10)


async def test_health_and_reflection_need_no_token(tenant_gateway: TenantGateway) -> None:
    async with grpc.aio.secure_channel(tenant_gateway.target, tenant_gateway.trust) as channel:
        checks: Any = health_pb2_grpc.HealthStub(channel)
        assert (await checks.Check(health_pb2.HealthCheckRequest(), timeout=10)).status == 1
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub
        listing = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        assert [answer async for answer in reflection(channel).ServerReflectionInfo(listing, timeout=10)]


async def refusal_of(stub: Stub, method: MethodDescriptor, session_id: str, reference_id: str) -> Refusal:
    """Return the status of a call that names resources which this tenant does not have."""
    reason = "REFERENCE_NOT_FOUND" if method.input_type.fields_by_name.get("reference_id") else "SESSION_NOT_FOUND"
    async with refused(reason) as refusal:
        await call(stub, method, request_for(method, session_id, reference_id)[0])
    refusal.message = refusal.message.replace(session_id, "NAME").replace(reference_id, "NAME")
    return refusal


async def test_names_of_another_tenant_are_refused_like_unknown_names(
    acme: Stub, globex: Stub, portrait: bytes
) -> None:
    for method in named():
        theirs = await new_session(acme, portrait)
        mine = await new_session(globex, portrait)
        await globex.DeleteSession(pb.DeleteSessionRequest(session_id=mine.id), timeout=10)
        await globex.DeleteReference(pb.DeleteReferenceRequest(reference_id=mine.reference_id), timeout=10)
        foreign = await refusal_of(globex, method, theirs.id, theirs.reference_id)
        assert foreign == await refusal_of(globex, method, mine.id, mine.reference_id), method.name
        unknown = [secrets.token_urlsafe(24), secrets.token_hex(32)]
        assert foreign == await refusal_of(globex, method, *unknown), method.name
        request, _ = request_for(method, theirs.id, theirs.reference_id)
        assert await status_of(acme, method, request) is not StatusCode.NOT_FOUND, "found by its own tenant"


async def test_a_stream_of_another_tenant_can_neither_be_interrupted_nor_resumed(
    acme: Stub, globex: Stub, portrait: bytes
) -> None:
    session = await new_session(acme, portrait)
    streaming, _ = await open_stream(acme, session.id, mode=pb.OpenAvatar.MODE_LIVE)
    resume = pb.StreamAvatarRequest(open=pb.OpenAvatar(session_id=session.id, resume=pb.ResumeAvatar(next_frame=3)))
    for request in (resume, opening(session.id)):
        async with refused("SESSION_NOT_FOUND"):
            await stream(globex, [request])
    async with refused("SESSION_NOT_FOUND"):
        await globex.Interrupt(pb.InterruptRequest(session_id=session.id), timeout=10)
    assert await acme.Interrupt(pb.InterruptRequest(session_id=session.id), timeout=10)
    assert await answer(streaming)
    streaming.cancel()


async def test_equal_pictures_of_two_tenants_are_two_references(acme: Stub, globex: Stub, portrait: bytes) -> None:
    mine, again = [(await new_reference(acme, portrait)).id for _ in range(2)]
    theirs = (await new_reference(globex, portrait)).id
    assert mine == again != theirs
    assert len(mine) == len(theirs) == 64
    await acme.DeleteReference(pb.DeleteReferenceRequest(reference_id=mine), timeout=10)
    assert await globex.GetReference(pb.GetReferenceRequest(reference_id=theirs), timeout=10)


async def test_a_session_records_its_tenant_and_streams(
    tenant_gateway: TenantGateway, acme: Stub, portrait: bytes
) -> None:
    session = await new_session(acme, portrait, seed=7)
    assert (await tenant_gateway.store.session(session.id)).tenant == "acme"
    assert len(session.id) >= 48, "a prefix and 192 random bits"
    assert len((await speak(acme, session.id, speech(1.0))).frames) == end_frame(1.0) - FIRST_FRAME


async def test_logs_hold_no_secret_and_no_media(
    tenant_gateway: TenantGateway, acme: Stub, portrait: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    log, root = StringIO(), logging.getLogger()
    handler, level = logging.StreamHandler(log), root.level
    handler.setFormatter(log_formatter())
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    prompt, data = "a person who whispers", speech(1.0)
    try:
        session = await new_session(acme, portrait)
        streamed = await speak(acme, session.id, data)
        async with refused("PROMPT_UNSUPPORTED"):
            await new_session(acme, portrait, prompt=prompt)
        async with refused("INVALID_AUDIO"):
            half = pb.StreamAvatarRequest(audio=pb.AudioPiece(data=data[:1001]))
            await stream(acme, [opening((await new_session(acme, portrait)).id), half])
        async with (
            tenant_gateway.connected("a wrong token") as stub,
            refused("UNAUTHENTICATED") as refusal,
        ):
            await stub.GetCapabilities(pb.GetCapabilitiesRequest(), timeout=10)
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    written = log.getvalue() + "".join(capfd.readouterr())
    assert "stream ended" in written
    assert "wrong token" not in refusal.message
    for secret in (ACME, "wrong token", session.id, session.reference_id, prompt):
        assert secret not in written
        assert hashlib.sha256(secret.encode()).hexdigest() not in written
    for media in (data[100:140], portrait[100:140], streamed.pixels[0][100:140]):
        for form in (str(media)[2:-1], media.hex(), base64.b64encode(media).decode()[4:40], str(list(media))):
            assert form not in written
