"""Calls about a session at another gateway than the one where it streams, over stand-in workers."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from avatar.client import channel_credentials
from avatar.rpc.status import error_of
from avatar.store.claims import Place
from avatar.store.sessions import SessionStore
from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import types_pb2 as types
from services.local.processes import free_ports
from tests.certificates import Authority
from tests.product import Stub, connected, frame, new_session, opening
from tests.refusals import refused
from tests.standin import standin_gateways

TOKEN, OTHER_TOKEN = "acme's token", "globex' token"
LIVE = pb.OpenAvatar.MODE_LIVE


def with_token(token: str = TOKEN) -> Any:
    return {"metadata": (("authorization", f"Bearer {token}"),), "timeout": 10}


@asynccontextmanager
async def two_gateways(
    store: SessionStore, folder: Path, second: dict[str, Any] | None = None
) -> AsyncGenerator[tuple[Stub, Stub], None]:
    """Two gateways of a deployment with tenants. second: settings of the second one."""
    file = folder / "tenants.toml"
    acme, globex = (hashlib.sha256(each.encode()).hexdigest() for each in (TOKEN, OTHER_TOKEN))
    file.write_text(f'[acme]\ntokens = ["{acme}"]\n[globex]\ntokens = ["{globex}"]\n')
    async with (
        standin_gateways(store, {}, second or {}, token=TOKEN, tenants=file) as gateways,
        connected(gateways[0].target) as here,
        connected(gateways[1].target) as there,
    ):
        yield here, there


async def created(stub: Stub) -> str:
    """Create a session; return its id."""
    reference = await stub.CreateReference(pb.CreateReferenceRequest(picture=b"picture"), **with_token())
    request = pb.CreateSessionRequest(reference_id=reference.reference.id)
    return (await stub.CreateSession(request, **with_token())).session.id


@asynccontextmanager
async def streaming(stub: Stub) -> AsyncGenerator[tuple[str, Any], None]:
    """A session with an open live stream, and its call."""
    session_id = await created(stub)
    call = stub.StreamAvatar(**with_token())
    await call.write(opening(session_id, mode=LIVE))
    await frame(call)
    yield session_id, call
    call.cancel()


def calls(stub: Stub, session_id: str, token: str = TOKEN) -> list[Any]:
    """Calls that only the gateway where a session streams can answer. An empty prompt needs no text worker."""
    session = types.Session(id=session_id)
    session.ttl.FromSeconds(500)
    update = pb.UpdateSessionRequest(session=session, update_mask=FieldMask(paths=["prompt", "ttl"]))
    return [
        stub.Interrupt(pb.InterruptRequest(session_id=session_id), **with_token(token)),
        stub.UpdateSession(update, **with_token(token)),
    ]


async def state(stub: Stub, session_id: str) -> int:
    session = await stub.GetSession(pb.GetSessionRequest(session_id=session_id), **with_token())
    return session.session.state


async def test_any_gateway_of_a_cell_answers_calls_about_a_session(store: SessionStore, tmp_path: Path) -> None:
    async with two_gateways(store, tmp_path) as (here, there), streaming(here) as (session_id, call):
        interrupted, updated = [await each for each in calls(there, session_id)]
        assert interrupted.next_frame >= 4
        assert (updated.session.ttl.seconds, updated.HasField("first_block")) == (500, True)
        assert await state(there, session_id) == types.Session.STATE_STREAMING
        call.cancel()
        async with asyncio.timeout(5):
            while await state(there, session_id) != types.Session.STATE_DETACHED:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        for each in calls(there, session_id, OTHER_TOKEN):
            async with refused("SESSION_NOT_FOUND"):
                await each
        await there.DeleteSession(pb.DeleteSessionRequest(session_id=session_id), **with_token())
        for each in calls(there, session_id):
            async with refused("SESSION_NOT_FOUND"):
                await each


async def test_a_gateway_of_another_cell_says_where_a_session_streams(store: SessionStore, tmp_path: Path) -> None:
    [port] = free_ports(1)
    first = f"127.0.0.1:{port}"
    async with (
        two_gateways(store, tmp_path, {"cell": "west", "listen": first}) as (east, west),
        streaming(west) as (session_id, _),
    ):
        for each in calls(east, session_id):
            async with refused("NOT_STREAMING") as refusal:
                await each
            assert refusal.metadata == {"gateway": first, "cell": "west"}
            assert "send the call there" in refusal.message
        assert await state(east, session_id) == types.Session.STATE_STREAMING


async def test_a_call_is_passed_on_once(store: SessionStore, tmp_path: Path) -> None:
    """The claim names a gateway that is gone, one that does not have the session, or none."""
    gone, port = free_ports(2)
    second = f"127.0.0.1:{port}"
    async with two_gateways(store, tmp_path, {"listen": second}) as (here, there):
        session_id = await created(there)
        async with refused("NOT_STREAMING") as refusal:
            await here.Interrupt(pb.InterruptRequest(session_id=session_id), **with_token())
        assert refusal.metadata == {}
        for target in (f"127.0.0.1:{gone}", second, ""):
            claim = store.claim(session_id, Place(target, "main"))
            await claim.acquire()
            for each in calls(here, session_id):
                async with refused("NOT_STREAMING") as refusal:
                    await each
                assert refusal.metadata == {"gateway": target, "cell": "main"}
            assert await state(here, session_id) == types.Session.STATE_STREAMING
            await claim.release()


@pytest.mark.parametrize("host", ["127.0.0.1", "edge.example.com"])
async def test_gateways_with_tls_trust_each_others_certificate_for_its_names(
    store: SessionStore, tmp_path: Path, host: str
) -> None:
    authority = Authority(tmp_path)
    edge = authority.issue("edge", host, "localhost")
    tls = {"tls_cert": edge.cert, "tls_key": edge.key, "tls_client_ca": authority.ca, "cell": "tls"}
    credentials = channel_credentials(authority.ca, edge.cert, edge.key)
    async with standin_gateways(store, {}, tls, tls) as gateways, AsyncExitStack() as stack:
        targets = [each.target.replace("127.0.0.1", "localhost") for each in gateways[1:]]
        here, there = [await stack.enter_async_context(connected(each, credentials)) for each in targets]
        session = await new_session(here, b"picture")
        call = here.StreamAvatar()
        await call.write(opening(session.id, mode=LIVE))
        await frame(call)
        try:
            interrupted = await there.Interrupt(pb.InterruptRequest(session_id=session.id))
            assert (host, interrupted.next_frame >= 4) == ("127.0.0.1", True)
        except grpc.aio.AioRpcError as error:
            refusal = error_of(error)
            assert (host, refusal.reason) == ("edge.example.com", "NOT_STREAMING")
            assert refusal.metadata == {"gateway": gateways[1].target, "cell": "tls"}
        call.cancel()
