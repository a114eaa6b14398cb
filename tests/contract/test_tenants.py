"""Tenants: nobody calls without a token, none can tell another's from what is not there, and all have their quotas.

The gateway is one of our own, over TLS, and its workers ask for certificates.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import secrets
from collections.abc import AsyncGenerator, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, TypeAlias

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

from avatar.session import MemoryHashes, SessionStore
from avatar.settings import GatewaySettings
from avatar.telemetry import JsonFormatter
from avatar.tls import channel_credentials
from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import avatar_service_pb2_grpc as pb_grpc
from services.__main__ import suite
from tests.certificates import Authority
from tests.conftest import sound
from tests.contract.refusals import Refusal, refused
from tests.contract.test_references import picture_file
from tests.product import PCM16, connected, new_session, opened, speak, stream

METHODS: list[MethodDescriptor] = list(pb.DESCRIPTOR.services_by_name["AvatarService"].methods)
# What a request must have beside names, so that nothing else of it is refused. A new method may do without.
BESIDE: dict[str, dict[str, Any]] = {
    "UpdateSession": {"session": {"ttl": {"seconds": 60}}, "update_mask": {"paths": ["ttl"]}},
    "StreamAvatar": {"open": {"audio": PCM16}},
}
ACME, GLOBEX = "acme's token", "globex's token"
Stub: TypeAlias = "pb_grpc.AvatarServiceAsyncStub"


@dataclass
class Gateway:
    """A gateway with tenants. target: HOST:PORT. store: where its sessions are."""

    target: str
    store: SessionStore
    trust: grpc.ChannelCredentials

    def called(self, token: str | None) -> AbstractAsyncContextManager[Stub]:
        """A stub whose calls carry a token."""
        if token is None:
            return connected(self.target, self.trust)
        bearer = grpc.access_token_call_credentials(token)
        return connected(self.target, grpc.composite_channel_credentials(self.trust, bearer))


@pytest.fixture
def quotas() -> str:
    """Lines of acme's table."""
    return ""


@pytest.fixture
async def gateway_of_tenants(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path: Path, quotas: str
) -> AsyncGenerator[Gateway, None]:
    if request.config.getoption("--target"):
        pytest.skip("of a gateway whose tokens are not known")
    tenants = tmp_path / "tenants.toml"
    acme, globex = (hashlib.sha256(token.encode()).hexdigest() for token in (ACME, GLOBEX))
    tenants.write_text(f'[acme]\ntokens = ["{acme}"]\n{quotas}\n[globex]\ntokens = ["{globex}"]')
    authority = Authority(tmp_path)
    edge, worker, client = (authority.issue(name, "127.0.0.1") for name in ("edge", "worker", "client"))
    settings = GatewaySettings(
        listen="127.0.0.1:0",
        tenants=tenants,
        tls_cert=edge.cert,
        tls_key=edge.key,
        worker_ca=authority.ca,
        worker_cert=client.cert,
        worker_key=client.key,
    )
    of_workers: dict[str, Any] = {"tls_cert": worker.cert, "tls_key": worker.key, "tls_client_ca": authority.ca}
    store = SessionStore(MemoryHashes())
    async with suite(checkpoint, store, settings, **of_workers) as target:
        yield Gateway(target, store, channel_credentials(authority.ca))


@pytest.fixture
async def acme(gateway_of_tenants: Gateway) -> AsyncGenerator[Stub, None]:
    async with gateway_of_tenants.called(ACME) as stub:
        yield stub


@pytest.fixture
async def globex(gateway_of_tenants: Gateway) -> AsyncGenerator[Stub, None]:
    async with gateway_of_tenants.called(GLOBEX) as stub:
        yield stub


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
    """How a call ends."""
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
        call: Any = channel.unary_unary("/avatar.v1.AvatarService/Invented")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"", timeout=10)
        assert caught.value.code() is StatusCode.UNIMPLEMENTED
        with pytest.raises(grpc.aio.AioRpcError):
            await channel.unary_unary("/avatar.v1.AvatarService/GetCapabilities")(b"", timeout=10)
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
    """How a call ends that names things which this tenant does not have."""
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
    await speaking.write(opened(session.id, mode=pb.OpenAvatar.MODE_LIVE))
    await speaking.read()
    resume = pb.StreamAvatarRequest(open=pb.OpenAvatar(session_id=session.id, resume=pb.ResumeAvatar(next_frame=3)))
    for request in (resume, opened(session.id)):
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
    streamed = await speak(acme, session.id, sound(1.0))
    assert len(streamed.frames) == 33


@pytest.mark.parametrize("quotas", ["max_sessions = 2"])
async def test_sessions_are_as_many_as_a_tenant_may_have(acme: Stub, globex: Stub, portrait: bytes) -> None:
    first, second = [await new_session(acme, portrait) for _ in range(2)]
    async with refused(StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED") as refusal:
        await new_session(acme, portrait)
    assert refusal.metadata == {"quota": "sessions"}
    assert refusal.retries
    assert await new_session(globex, portrait)
    await speak(acme, first.id, sound(0.5))
    third = await new_session(acme, portrait)
    await acme.DeleteSession(pb.DeleteSessionRequest(session_id=second.id), timeout=10)
    await new_session(acme, portrait)
    async with refused(StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED"):
        await new_session(acme, portrait)
    await speak(acme, third.id, sound(0.5))


@pytest.mark.parametrize("quotas", ["max_references = 1"])
async def test_references_are_as_many_as_a_tenant_may_keep(acme: Stub, globex: Stub, portrait: bytes) -> None:
    mine, other = pb.CreateReferenceRequest(picture=portrait), pb.CreateReferenceRequest(picture=picture_file(64, 64))
    reference = (await acme.CreateReference(mine, timeout=60)).reference
    assert (await acme.CreateReference(mine, timeout=60)).reference.id == reference.id
    async with refused(StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED") as refusal:
        await acme.CreateReference(other, timeout=60)
    assert refusal.metadata == {"quota": "references"}
    assert not refusal.retries
    assert await globex.CreateReference(other, timeout=60)
    await acme.DeleteReference(pb.DeleteReferenceRequest(reference_id=reference.id), timeout=10)
    assert await acme.CreateReference(other, timeout=60)


@pytest.mark.parametrize("quotas", ["max_audio_s = 2"])
async def test_sound_is_as_much_as_a_tenant_may_send(acme: Stub, globex: Stub, portrait: bytes) -> None:
    await speak(acme, (await new_session(acme, portrait)).id, sound(1.5))
    session = await new_session(acme, portrait)
    async with refused(StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED") as refusal:
        await speak(acme, session.id, sound(1.5))
    assert refusal.metadata == {"quota": "audio"}
    session = await new_session(acme, portrait)
    async with refused(StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED") as refusal:
        await stream(acme, [opened(session.id)])
    assert 0 < refusal.retry_s <= 86400, "the day ends"
    await speak(globex, (await new_session(globex, portrait)).id, sound(0.5))


async def test_logs_hold_no_secret_and_no_media(
    gateway_of_tenants: Gateway, acme: Stub, portrait: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    log, root = StringIO(), logging.getLogger()
    handler, level = logging.StreamHandler(log), root.level
    handler.setFormatter(JsonFormatter())
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    prompt, said = "a person who whispers", sound(1.0)
    try:
        session = await new_session(acme, portrait)
        streamed = await speak(acme, session.id, said)
        async with refused(StatusCode.FAILED_PRECONDITION, "PROMPT_UNSUPPORTED"):
            await new_session(acme, portrait, prompt=prompt)
        async with refused(StatusCode.INVALID_ARGUMENT, "INVALID_AUDIO"):
            half = pb.StreamAvatarRequest(audio=pb.AudioPiece(data=said[:1001]))
            await stream(acme, [opened((await new_session(acme, portrait)).id), half])
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
