"""Calls to Redis, and bytes out of it, for each call of a client, by Redis' own account."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from redis.asyncio import Redis
from redis.asyncio.client import Monitor

from avatar.store.claims import CLAIM_TTL_S
from avatar.store.sessions import SessionStore
from avatar.v1 import avatar_service_pb2 as pb
from avatar.worker.v1 import types_pb2
from benchmarks.standin.content import Content
from tests.product import Stub, connected, finish, frame, new_session, open_stream, pieces, send
from tests.refusals import refused
from tests.standin import standin_gateway

# The public 14B network's motion latents and sink at 704x384, in bfloat16.
MOTION_BYTES, SINK_BYTES = 16 * 19 * 48 * 88 * 2, 16 * 48 * 88 * 2
# Commands in their order. One that is added here costs every session a round trip.
CREATE_SESSION = ["HMGET", "EVALSHA", "HSET"]  # the reference, the lease of its latents, the record
OPEN = ["EVALSHA", "EVALSHA", "EVALSHA"]  # claim and record, commit, status
FIRST_OPEN = ["EVALSHA", "HMGET", "EVALSHA", "EVALSHA"]  # also the latents
REFUSAL = ["EVALSHA", "EVALSHA"]  # claim and record, release
GET_SESSION = ["EVALSHA"]
# In one transaction with HSET.
WITH_HSET = {"DEL", "PEXPIRE"}


@asynccontextmanager
async def portrait_gateway(store: SessionStore, limit: int = 16) -> AsyncGenerator[Stub, None]:
    """A gateway whose store has references of the 14B network's size: `face`, and one that has a stream.

    limit: streams at a time at a worker.
    """
    for name in ("warm", "face"):
        reference = types_pb2.Reference(
            id=name,
            width=704,
            height=384,
            frame_rate_hz=25,
            block_frames=12,
            motion=types_pb2.Tensor(dtype="uint8", shape=[MOTION_BYTES], data=bytes(MOTION_BYTES)),
            sink=types_pb2.Tensor(dtype="uint8", shape=[SINK_BYTES], data=bytes(SINK_BYTES)),
        )
        await store.references.put(reference, 60.0)
    async with standin_gateway(store, limit=limit) as gateway, connected(gateway.target) as stub:
        # The first time, connections are opened and scripts are loaded.
        call, _ = await open_stream(stub, await new_session_of("warm", stub))
        yield stub
        call.cancel()


async def new_session_of(reference_id: str, stub: Stub) -> str:
    return (await stub.CreateSession(pb.CreateSessionRequest(reference_id=reference_id), timeout=10)).session.id


async def commands_about(names: set[str], client: Redis, monitor: Monitor) -> list[str]:
    """Return the commands that name one of those since the last call, without those within scripts."""
    await client.echo("end")
    commands = []
    while (command := await monitor.next_command())["command"] != "ECHO end":
        kind = command["command"].partition(" ")[0]
        is_about = any(f"{{{name}}}" in command["command"] for name in names)
        if is_about and command["client_type"] != "lua" and kind not in WITH_HSET:
            commands.append(kind)
    return commands


async def test_no_call_of_a_client_makes_more_calls_to_redis(store: SessionStore, redis_client: Redis) -> None:
    async with portrait_gateway(store) as stub, redis_client.monitor() as monitor:
        first = await new_session_of("face", stub)
        assert await commands_about({"face", first}, redis_client, monitor) == CREATE_SESSION
        second = await new_session_of("face", stub)
        await commands_about(set(), redis_client, monitor)
        await open_stream(stub, first)
        assert await commands_about({"face", first}, redis_client, monitor) == FIRST_OPEN
        await open_stream(stub, second)
        assert await commands_about({"face", second}, redis_client, monitor) == OPEN
        await stub.GetSession(pb.GetSessionRequest(session_id=first), timeout=10)
        assert await commands_about({"face", first}, redis_client, monitor) == GET_SESSION


async def test_a_position_is_written_after_480_ms_of_speech_and_seldom_in_silence(
    store: SessionStore, redis_client: Redis
) -> None:
    content = Content(block_latents=1)
    async with standin_gateway(store, content=content) as gateway, connected(gateway.target) as stub:
        session = await new_session(stub, b"picture")
        async with redis_client.monitor() as monitor:
            call, _ = await open_stream(stub, session.id, mode=pb.OpenAvatar.MODE_LIVE)
            await commands_about(set(), redis_client, monitor)
            started_s = time.monotonic()

            async def num_writes_until(block: int) -> int:
                while (await frame(call)).index < block * content.block_frames:
                    pass
                return len(await commands_about({session.id}, redis_client, monitor))

            await send(call, pieces(bytes(6 * content.block_bytes())))
            in_speech, in_silence = await num_writes_until(9), await num_writes_until(18)
            num_renewals = (time.monotonic() - started_s) / (CLAIM_TTL_S / 3)
            assert 2 <= in_speech <= 5 + num_renewals
            assert in_silence <= 1 + num_renewals
            await finish(call)


async def test_a_refusal_reads_no_latents(store: SessionStore, redis_client: Redis) -> None:
    async with portrait_gateway(store, limit=1) as stub, redis_client.monitor() as monitor:
        session_id = await new_session_of("face", stub)
        await commands_about(set(), redis_client, monitor)
        async with refused("NO_CAPACITY"):
            await open_stream(stub, session_id)
        assert await commands_about({"face", session_id}, redis_client, monitor) == REFUSAL


async def test_a_session_whose_latents_the_store_has_lost_is_not_found(
    store: SessionStore, redis_client: Redis
) -> None:
    async with portrait_gateway(store) as stub:
        session_id = await new_session_of("face", stub)
        await redis_client.delete("avatar:latents:{face}")
        async with refused("SESSION_NOT_FOUND"):
            await open_stream(stub, session_id)


async def test_no_call_of_a_client_moves_more_bytes_out_of_redis(store: SessionStore, redis_client: Redis) -> None:
    async def num_bytes() -> int:
        """Return the bytes that Redis has sent since its start."""
        return int((await redis_client.info("stats"))["total_net_output_bytes"])

    async with portrait_gateway(store) as stub:
        overhead = -await num_bytes() + await num_bytes()

        async def since(before: int) -> int:
            return await num_bytes() - before - overhead

        before = await num_bytes()
        first, second = [await new_session_of("face", stub) for _ in range(2)]
        assert await since(before) < 4096
        before = await num_bytes()
        await open_stream(stub, first)
        assert MOTION_BYTES < await since(before) < MOTION_BYTES + SINK_BYTES + 4096
        before = await num_bytes()
        await open_stream(stub, second)
        assert await since(before) < 4096
        before = await num_bytes()
        await stub.GetSession(pb.GetSessionRequest(session_id=first), timeout=10)
        assert await since(before) < 2048
