"""Tenants: nobody calls without a token, and none can tell another's from what is not there."""

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
from tests.conftest import speech
from tests.contract.refusals import Refusal, refused
from tests.contract.tenants import ACME, Gateway
from tests.product import PCM16, Stub, new_session, opening, speak, stream

METHODS: list[MethodDescriptor] = list(pb.DESCRIPTOR.services_by_name["AvatarService"].methods)
# What a request must have beside names, so that nothing else of it is refused. A new method may do without.
BESIDE: dict[str, dict[str, Any]] = {
    "UpdateSession": {"session": {"ttl": {"seconds": 60}}, "update_mask": {"paths": ["ttl"]}},
    "StreamAvatar": {"open": {"audio": PCM16}},
}


async def call(stub: Stub, method: MethodDescriptor, request: Message) -> Any:
    """The first answer of any method."""
    made = getattr(stub, method.name)
    if not method.client_streaming:
        return await made(request, timeout=30)
    stream = made(timeout=30)
    await stream.write(request)
    answer = await stream.read()
    stream.cancel()
    return answer


async def ending(stub: Stub, method: MethodDescriptor, request: Message) -> StatusCode:
    """Return the status that a call ends with."""
    try:
        await call(stub, method, request)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return StatusCode.OK


def naming(method: MethodDescriptor, session_id: str, reference_id: str) -> tuple[Message, int]:
    """A request that is good but for the names in it, and how many these are."""
    request: Message = GetMessageClass(method.input_type)(**BESIDE.get(method.name, {}))
    return request, name_all(request, {"session_id": session_id, "reference_id": reference_id})


def name_all(message: Message, names: dict[str, str]) -> int:
    """Set each field that holds a name, as deep as there are any; of alternatives the first that holds one."""
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
    """Methods whose requests hold a name."""
    return (method for method in METHODS if naming(method, "x", "x")[1])


def test_every_method_but_two_is_of_something_that_has_a_name() -> None:
    assert {method.name for method in METHODS} - {method.name for method in named()} == {
        "GetCapabilities",
        "CreateReference",
    }


async def test_nothing_can_be_called_without_a_token(gateway_of_tenants: Gateway) -> None:
    for token in (None, "", "another token", hashlib.sha256(ACME.encode()).hexdigest()):
        async with gateway_of_tenants.called(token) as stub:
            for method in METHODS:
                async with refused(StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"):
                    await call(stub, method, GetMessageClass(method.input_type)())


async def test_a_method_that_is_not_there_is_not_counted(
    gateway_of_tenants: Gateway, measured: InMemoryMetricReader
) -> None:
    async with grpc.aio.secure_channel(gateway_of_tenants.target, gateway_of_tenants.trust) as channel:
        known: Any = channel.unary_unary("/avatar.v1.AvatarService/GetCapabilities")
        invented: Any = channel.unary_unary("/avatar.v1.AvatarService/Invented")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await invented(b"", timeout=10)
        assert caught.value.code() is StatusCode.UNIMPLEMENTED
        with pytest.raises(grpc.aio.AioRpcError):
            await known(b"", timeout=10)
    data = measured.get_metrics_data()
    assert data
    counted = data.to_json()
    assert "/avatar.v1.AvatarService/GetCapabilities" in counted
    assert "Invented" not in counted


WRONG = [
    [("authorization", ACME)],
    [("authorization", f"Basic {ACME}")],
    [("authorization", "Bearer")],
    [("authorization", f"Bearer  {ACME}")],
    [("authorization", f"Bearer {ACME}"), ("authorization", f"Bearer {ACME}")],
    [("x-authorization", f"Bearer {ACME}")],
]


async def test_a_token_comes_as_one_bearer_token(gateway_of_tenants: Gateway) -> None:
    async with gateway_of_tenants.called(None) as stub:
        for metadata in WRONG:
            async with refused(StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"):
                await stub.GetCapabilities(pb.GetCapabilitiesRequest(), metadata=metadata, timeout=10)
        good = [("authorization", f"bearer {ACME}")]
        assert await stub.GetCapabilities(pb.GetCapabilitiesRequest(), metadata=good, timeout=10)


async def test_health_and_reflection_are_for_everybody(gateway_of_tenants: Gateway) -> None:
    async with grpc.aio.secure_channel(gateway_of_tenants.target, gateway_of_tenants.trust) as channel:
        checks: Any = health_pb2_grpc.HealthStub(channel)
        assert (await checks.Check(health_pb2.HealthCheckRequest(), timeout=10)).status == 1
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub
        listing = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        assert [answer async for answer in reflection(channel).ServerReflectionInfo(listing, timeout=10)]


async def outcome(stub: Stub, method: MethodDescriptor, session_id: str, reference_id: str) -> Refusal:
    """Return the status of a call that names resources which this tenant does not have."""
    reason = "REFERENCE_NOT_FOUND" if method.input_type.fields_by_name.get("reference_id") else "SESSION_NOT_FOUND"
    async with refused(StatusCode.NOT_FOUND, reason) as refusal:
        await call(stub, method, naming(method, session_id, reference_id)[0])
    refusal.message = refusal.message.replace(session_id, "NAME").replace(reference_id, "NAME")
    return refusal


async def test_what_is_anothers_cannot_be_told_from_what_is_not_there(
    acme: Stub, globex: Stub, portrait: bytes
) -> None:
    for method in named():
        theirs = await new_session(acme, portrait)
        mine = await new_session(globex, portrait)
        await globex.DeleteSession(pb.DeleteSessionRequest(session_id=mine.id), timeout=10)
        await globex.DeleteReference(pb.DeleteReferenceRequest(reference_id=mine.reference_id), timeout=10)
        foreign = await outcome(globex, method, theirs.id, theirs.reference_id)
        assert foreign == await outcome(globex, method, mine.id, mine.reference_id), method.name
        unknown = [secrets.token_urlsafe(24), secrets.token_hex(32)]
        assert foreign == await outcome(globex, method, *unknown), method.name
        request, _ = naming(method, theirs.id, theirs.reference_id)
        assert await ending(acme, method, request) is not StatusCode.NOT_FOUND, "its own tenant finds it"


async def test_a_stream_of_anothers_is_neither_interrupted_nor_resumed(
    acme: Stub, globex: Stub, portrait: bytes
) -> None:
    session = await new_session(acme, portrait)
    speaking = acme.StreamAvatar(timeout=30)
    await speaking.write(opening(session.id, mode=pb.OpenAvatar.MODE_LIVE))
    await speaking.read()
    resume = pb.StreamAvatarRequest(open=pb.OpenAvatar(session_id=session.id, resume=pb.ResumeAvatar(next_frame=3)))
    for request in (resume, opening(session.id)):
        async with refused(StatusCode.NOT_FOUND, "SESSION_NOT_FOUND"):
            await stream(globex, [request])
    async with refused(StatusCode.NOT_FOUND, "SESSION_NOT_FOUND"):
        await globex.Interrupt(pb.InterruptRequest(session_id=session.id), timeout=10)
    assert await acme.Interrupt(pb.InterruptRequest(session_id=session.id), timeout=10)
    assert isinstance(await speaking.read(), pb.StreamAvatarResponse)
    speaking.cancel()


async def test_the_same_picture_is_another_reference_to_another_tenant(
    acme: Stub, globex: Stub, portrait: bytes
) -> None:
    request = pb.CreateReferenceRequest(picture=portrait)
    mine, again = [(await acme.CreateReference(request, timeout=60)).reference.id for _ in range(2)]
    theirs = (await globex.CreateReference(request, timeout=60)).reference.id
    assert mine == again != theirs
    assert len(mine) == len(theirs) == 64
    await acme.DeleteReference(pb.DeleteReferenceRequest(reference_id=mine), timeout=10)
    assert await globex.GetReference(pb.GetReferenceRequest(reference_id=theirs), timeout=10)


async def test_a_session_notes_whose_it_is(gateway_of_tenants: Gateway, acme: Stub, portrait: bytes) -> None:
    session = await new_session(acme, portrait)
    assert (await gateway_of_tenants.store.session(session.id)).tenant == "acme"
    assert len(session.id) >= 48, "a mark and 192 random bits"


async def test_a_session_of_a_tenant_speaks_as_any(acme: Stub, portrait: bytes) -> None:
    session = await new_session(acme, portrait, seed=7)
    streamed = await speak(acme, session.id, speech(1.0))
    assert len(streamed.frames) == 33


async def test_logs_hold_no_secret_and_no_media(
    gateway_of_tenants: Gateway, acme: Stub, portrait: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    log, root = StringIO(), logging.getLogger()
    handler, level = logging.StreamHandler(log), root.level
    handler.setFormatter(log_formatter())
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    prompt, said = "a person who whispers", speech(1.0)
    try:
        session = await new_session(acme, portrait)
        streamed = await speak(acme, session.id, said)
        async with refused(StatusCode.FAILED_PRECONDITION, "PROMPT_UNSUPPORTED"):
            await new_session(acme, portrait, prompt=prompt)
        async with refused(StatusCode.INVALID_ARGUMENT, "INVALID_AUDIO"):
            half = pb.StreamAvatarRequest(audio=pb.AudioPiece(data=said[:1001]))
            await stream(acme, [opening((await new_session(acme, portrait)).id), half])
        async with (
            gateway_of_tenants.called("a wrong token") as stub,
            refused(StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED") as refusal,
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
    for media in (said[100:140], portrait[100:140], streamed.pixels[0][100:140]):
        for shown in (str(media)[2:-1], media.hex(), base64.b64encode(media).decode()[4:40], str(list(media))):
            assert shown not in written
