"""Tests of services.gateway.cell, over stand-in workers: calls at another gateway than a session's, and drains."""

import asyncio
import hashlib
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import redis.asyncio
from google.protobuf.field_mask_pb2 import FieldMask
from grpc_health.v1 import health_pb2, health_pb2_grpc
from redis.asyncio import Redis

from avatar.client import channel_credentials
from avatar.rpc.channel import channel
from avatar.rpc.status import error_of
from avatar.settings import GatewaySettings
from avatar.store.claims import Place
from avatar.store.sessions import SessionStore
from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import types_pb2 as types
from services.gateway import cell as module
from services.gateway.cell import Cell, main
from services.local.processes import free_ports
from tests.certificates import Authority
from tests.product import Stub, connected, frame, new_session, open_stream, opening
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


async def test_a_frozen_gateway_leaves_its_callers_time_for_an_answer(store: SessionStore, tmp_path: Path) -> None:
    # As at a stopped process, the kernel accepts connections, and nothing answers.
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        target = "{}:{}".format(*frozen.getsockname())
        async with two_gateways(store, tmp_path) as (here, _):
            session_id = await created(here)
            await store.claim(session_id, Place(target, "main")).acquire()
            short = here.Interrupt(pb.InterruptRequest(session_id=session_id), **with_token() | {"timeout": 2})
            *errors, streaming = await asyncio.gather(
                short, *calls(here, session_id), state(here, session_id), return_exceptions=True
            )
            for error in errors:
                assert isinstance(error, grpc.aio.AioRpcError)
                refusal = error_of(error)
                assert (refusal.reason, refusal.metadata) == ("NOT_STREAMING", {"gateway": target, "cell": "main"})
            assert streaming == types.Session.STATE_STREAMING


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


async def test_a_cell_stays_drained_if_the_store_loses_its_data(store: SessionStore, redis_client: Redis) -> None:
    cell, other = (Cell(GatewaySettings(), store.workers("main")) for _ in range(2))
    await store.workers("main").set_drained(is_drained=True)
    await cell.read()
    await redis_client.flushdb()
    for each in (cell, other):
        await each.read()
        assert each.is_drained
    await store.workers("main").set_drained(is_drained=False)
    for each in (cell, other):
        await each.read()
        assert not each.is_drained


async def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Run `python -m services.gateway.cell` with these arguments."""
    monkeypatch.setattr("sys.argv", ["cell", *arguments])
    await asyncio.to_thread(main)


async def num_free(stub: Stub) -> int:
    return (await stub.GetCapabilities(pb.GetCapabilitiesRequest())).free_sessions


async def is_draining(stub: Stub) -> bool:
    return (await stub.GetCapabilities(pb.GetCapabilitiesRequest())).draining


async def is_open(stub: Stub) -> bool:
    return not await is_draining(stub)


async def until(is_so: Callable[[], Awaitable[bool]]) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(10):
        while not await is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_a_gateway_starts_beside_a_broken_entry_of_the_registry_and_knows_that_workers_are_full(
    store: SessionStore,
    redis: str,
    redis_client: redis.asyncio.Redis,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("AVATAR_REDIS_URL", redis)
    await redis_client.hset("avatar:workers:{main}", "junk", b"\xff\xff\xff")
    await redis_client.zadd("avatar:workers-seen:{main}", {"junk": "+inf"})
    async with standin_gateways(store, {}, limit=1) as [gateway], connected(gateway.target) as stub:
        first, second = await new_session(stub, b"picture"), await new_session(stub, b"picture")
        await open_stream(stub, first.id, mode=LIVE)
        async with refused("NO_CAPACITY"), asyncio.timeout(10):
            await open_stream(stub, second.id, mode=LIVE)
        await run_command(monkeypatch, "show", "main")
    assert capsys.readouterr().out.startswith("cell main: open, ")


async def test_a_drained_cell_keeps_its_streams_and_opens_no_new_ones(
    store: SessionStore, redis: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("services.gateway.cell.READ_EVERY_S", 0.05)
    monkeypatch.setenv("AVATAR_REDIS_URL", redis)
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    async with standin_gateways(store, *({"cell": each} for each in ("east", "west", "east"))) as gateways:
        async with AsyncExitStack() as stack:
            east, west, east_too = [await stack.enter_async_context(connected(each.target)) for each in gateways]
            connections = [await stack.enter_async_context(channel(each.target)) for each in gateways]

            async def health(service: str = "avatar.v1.AvatarService") -> list[int]:
                checks: list[Any] = [health_pb2_grpc.HealthStub(each) for each in connections]
                request = health_pb2.HealthCheckRequest(service=service)
                return [(await each.Check(request)).status for each in checks]

            session, idle = await new_session(east, b"picture"), await new_session(east, b"picture")
            assert await num_free(east) == 16
            call, _ = await open_stream(east, session.id, mode=LIVE)
            assert await num_free(east) == 15
            await run_command(monkeypatch, "drain", "east")
            for stub in (east, east_too):
                await until(partial(is_draining, stub))
                async with refused("DRAINING") as refusal:
                    await open_stream(stub, idle.id, mode=LIVE)
                assert refusal.metadata == {"cell": "east"}
                assert 1 <= refusal.retry_s <= 3
            assert not await is_draining(west)
            assert await health() == [not_serving, serving, not_serving]
            assert await health("") == [serving] * 3
            last = await frame(call)
            moved, _ = await open_stream(east_too, session.id, resume=pb.ResumeAvatar(next_frame=last.index + 1))
            assert (await frame(moved)).index == last.index + 1
            elsewhere, _ = await open_stream(west, idle.id, mode=LIVE)
            await frame(elsewhere)
        async with standin_gateways(store, {"cell": "east"}) as [restarted], connected(restarted.target) as stub:
            assert await is_draining(stub)
            await run_command(monkeypatch, "undrain", "east")
            await until(partial(is_open, stub))
    drained, opened = capsys.readouterr().out.splitlines()
    assert drained.startswith("cell east: drained, no workers")
    assert opened.startswith("cell east: open, no workers")


async def test_the_command_names_its_setting_where_redis_cannot_be_reached(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AVATAR_REDIS_URL", "redis://127.0.0.1:1")
    with pytest.raises(SystemExit):
        await run_command(monkeypatch, "show", "east")
    assert "AVATAR_REDIS_URL" in capsys.readouterr().err


async def test_an_unforeseen_error_does_not_end_the_reading_of_the_drain(
    store: SessionStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read, num_calls = asyncio.Event(), 0

    async def fail_once(_: Cell) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 1:
            raise KeyError("own")
        read.set()

    monkeypatch.setattr(module, "READ_EVERY_S", 0.0)
    monkeypatch.setattr(Cell, "read", fail_once)
    async with Cell(GatewaySettings(), store.workers("main")).serving("here:1"), asyncio.timeout(30):
        await read.wait()
    assert [each.message for each in caplog.records if each.levelname == "ERROR"] == ["drain of the cell not read"]
