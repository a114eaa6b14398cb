"""Quotas at a gateway over stand-in workers: records, and the order of work and quota."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from redis.asyncio import Redis

from avatar.store.sessions import SessionStore
from avatar.v1 import avatar_service_pb2 as pb
from tests.product import CLOSE, Stub, answer, connected, opening, rest
from tests.refusals import refused
from tests.standin import StandInGateway, standin_gateway

TOKEN = "acme's token"
AS_ACME: Any = {"metadata": (("authorization", f"Bearer {TOKEN}"),), "timeout": 10}
LIVE = pb.OpenAvatar.MODE_LIVE


@asynccontextmanager
async def tenants_gateway(
    store: SessionStore, redis: str, folder: Path, quotas: str, **settings: Any
) -> AsyncGenerator[tuple[StandInGateway, Stub], None]:
    """A gateway with one tenant. settings: further ones of the gateway."""
    file = folder / "tenants.toml"
    file.write_text(f'[acme]\ntokens = ["{hashlib.sha256(TOKEN.encode()).hexdigest()}"]\n{quotas}')
    # Capabilities, which the gateway's start waits for, need a token too.
    async with (
        standin_gateway(store, token=TOKEN, tenants=file, redis_url=redis, **settings) as gateway,
        connected(gateway.target) as stub,
    ):
        yield gateway, stub


async def test_records_stay_within_the_quota_whatever_a_client_does(
    store: SessionStore, redis: str, redis_client: Redis, tmp_path: Path
) -> None:
    """It creates, opens, cancels, closes and deletes several sessions at a time."""
    num_records, num_created, is_done = [0], 0, False

    async def vary(stub: Stub, request: pb.CreateSessionRequest, number: int) -> None:
        nonlocal num_created
        for turn in range(8):
            creating = stub.CreateSession(request, **AS_ACME)
            if (number + turn) % 4 == 3:
                await asyncio.sleep(0.001 * turn)
                creating.cancel()
            with suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
                session = (await creating).session
                num_created += 1
                call = stub.StreamAvatar(**AS_ACME)
                await call.write(opening(session.id, mode=LIVE))
                if turn % 2:  # and then it gives way to the next one
                    await answer(call)
                    await call.write(CLOSE)
                    await rest(call)
                    continue
                call.cancel()
                await stub.DeleteSession(pb.DeleteSessionRequest(session_id=session.id), **AS_ACME)

    async def watch() -> None:
        # Not cancelled: the client's own timeouts swallow a cancellation before Python 3.12.
        while not is_done:
            num_records.append(len(await redis_client.keys("avatar:session:*")))
            await asyncio.sleep(0.002)

    async with tenants_gateway(store, redis, tmp_path, "max_sessions = 2") as (_, stub):
        reference = (await stub.CreateReference(pb.CreateReferenceRequest(picture=b"picture"), **AS_ACME)).reference
        request = pb.CreateSessionRequest(reference_id=reference.id, ttl=Duration(seconds=86400))
        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            tasks.create_task(watch())
            await asyncio.gather(*(vary(stub, request, number) for number in range(4)))
            is_done = True
    assert num_created > 2
    assert max(num_records) == 2


async def test_a_session_whose_stream_has_ended_gives_way_to_a_new_one(
    store: SessionStore, redis: str, tmp_path: Path
) -> None:
    async with tenants_gateway(store, redis, tmp_path, "max_sessions = 1") as (_, stub):
        reference = (await stub.CreateReference(pb.CreateReferenceRequest(picture=b"picture"), **AS_ACME)).reference
        request = pb.CreateSessionRequest(reference_id=reference.id)
        first = (await stub.CreateSession(request, **AS_ACME)).session
        async with refused("QUOTA_EXCEEDED"):
            await stub.CreateSession(request, **AS_ACME)
        call = stub.StreamAvatar(**AS_ACME)
        await call.write(opening(first.id, mode=LIVE))
        await answer(call)
        async with refused("QUOTA_EXCEEDED"):
            await stub.CreateSession(request, **AS_ACME)
        await call.write(CLOSE)
        await rest(call)
        kept = (await stub.GetSession(pb.GetSessionRequest(session_id=first.id), **AS_ACME)).session
        assert kept.state == kept.STATE_CLOSED
        assert (await stub.CreateSession(request, **AS_ACME)).session.id != first.id
        async with refused("SESSION_NOT_FOUND"):
            await stub.GetSession(pb.GetSessionRequest(session_id=first.id), **AS_ACME)


async def test_a_reference_over_the_quota_is_refused_before_it_is_encoded(
    store: SessionStore, redis: str, tmp_path: Path
) -> None:
    async with tenants_gateway(store, redis, tmp_path, "max_references = 1") as (gateway, stub):

        async def create(picture: bytes) -> str:
            response = await stub.CreateReference(pb.CreateReferenceRequest(picture=picture), **AS_ACME)
            return response.reference.id

        gateway.vae.refusal = "no picture"
        async with refused("INVALID_FIELD"):
            await create(b"damaged")
        gateway.vae.refusal = ""
        first = await create(b"first")
        async with refused("QUOTA_EXCEEDED"):
            await create(b"second")
        assert await create(b"first") == first
        assert gateway.vae.pictures == [b"first", b"first"]
        await stub.DeleteReference(pb.DeleteReferenceRequest(reference_id=first), **AS_ACME)
        await create(b"second")


@pytest.mark.parametrize("num_pictures", [8])
async def test_concurrent_references_stay_within_the_quota(
    store: SessionStore, redis: str, tmp_path: Path, num_pictures: int
) -> None:
    async with tenants_gateway(store, redis, tmp_path, "max_references = 2") as (gateway, stub):
        requests = [pb.CreateReferenceRequest(picture=bytes([number])) for number in range(num_pictures)]
        calls = [stub.CreateReference(request, **AS_ACME) for request in requests]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert sum(not isinstance(each, BaseException) for each in outcomes) == 2
        assert len(gateway.vae.pictures) == 2
