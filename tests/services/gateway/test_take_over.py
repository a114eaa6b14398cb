"""Streams that move from gateway to gateway, over stand-in workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import grpc.aio
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from redis.asyncio import Redis

from avatar.aio import background
from avatar.errors import StageFailed, StoreUnavailable
from avatar.rpc.interceptor import Context
from avatar.rpc.server import serving
from avatar.rpc.status import error_of
from avatar.runtime.device_queue import DeviceQueue
from avatar.store.claims import Claim
from avatar.store.sessions import SessionStore
from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import avatar_service_pb2_grpc as pb_grpc
from avatar.v1 import types_pb2 as types
from avatar.worker.v1 import vae_pb2
from benchmarks.standin.service import Stage, VaeServicer
from benchmarks.standin.step import Step
from tests.product import CLOSE, Call, Stub, connected, finish, frame, new_session, open_stream, pieces, rest, send
from tests.refusals import refused
from tests.standin import StandInGateway, standin_gateways

LIVE = pb.OpenAvatar.MODE_LIVE
WAIT_S = 10.0
# Options of a channel that buffers little before its client reads.
SMALL = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16384)]


@asynccontextmanager
async def cell(
    store: SessionStore, limit: int, second: dict[str, Any] | None = None
) -> AsyncGenerator[tuple[StandInGateway, Stub, Stub], None]:
    """Two gateways over workers that have room for `limit` streams. second: settings of the second gateway."""
    async with standin_gateways(store, {}, second or {}, limit=limit) as gateways, AsyncExitStack() as stack:
        stubs = [await stack.enter_async_context(connected(gateway.target)) for gateway in gateways]
        yield gateways[0], stubs[0], stubs[1]


async def resumed(stub: Stub, session_id: str, next_frame: int) -> Call:
    call, _ = await open_stream(stub, session_id, resume=pb.ResumeAvatar(next_frame=next_frame))
    return call


async def test_a_stream_moves_between_gateways_although_the_workers_have_room_for_one(store: SessionStore) -> None:
    """The gateway before lives, and has not seen yet that its connection is broken."""
    async with cell(store, limit=1) as (workers, *stubs):
        session = await new_session(stubs[0], b"picture")
        call, _ = await open_stream(stubs[0], session.id, mode=LIVE)
        calls = [call]
        for turn in range(1, 6):
            last = await frame(calls[-1])
            async with asyncio.timeout(WAIT_S):
                calls.append(await resumed(stubs[turn % 2], session.id, last.index + 1))
                assert (await frame(calls[-1])).index == last.index + 1
        for lost in calls[:-1]:
            # A gateway that has not let a stream go when it comes back there ends its old connection instead.
            async with refused("SESSION_BUSY", "CONNECTION_LOST"):
                await rest(lost)
        assert workers.num_streams == 1
        calls[-1].cancel()


async def open_whenever_possible(stub: Stub, session_id: str, ended: asyncio.Event) -> None:
    """Open a stream as soon as the workers have room, and keep it open for a second, until the event is set.

    grpc.aio loses a cancellation that comes while a call begins, so a cancellation alone might not end this.
    """
    while not ended.is_set():
        with suppress(grpc.aio.AioRpcError, TimeoutError):
            async with asyncio.timeout(1):
                await rest((await open_stream(stub, session_id, mode=LIVE))[0])


async def test_a_stream_that_moves_keeps_its_slots_although_others_wait_for_them(store: SessionStore) -> None:
    async with cell(store, limit=1) as (workers, *stubs), AsyncExitStack() as stack:
        session = await new_session(stubs[0], b"picture")
        call, _ = await open_stream(stubs[0], session.id, mode=LIVE)
        last, ended = await frame(call), asyncio.Event()
        for stub in stubs:
            other = await new_session(stub, b"picture")
            await stack.enter_async_context(background(open_whenever_possible(stub, other.id, ended)))
        stack.callback(ended.set)
        async with asyncio.timeout(WAIT_S):
            for turn in range(1, 4):
                call = await resumed(stubs[turn % 2], session.id, last.index + 1)
                last, before = await frame(call), last
                assert last.index == before.index + 1
        assert workers.num_streams == 1
        call.cancel()


async def first_frame_or_reason(stub: Stub, session_id: str, next_frame: int) -> int | str:
    """Resume a stream; return the number of its first frame, or the reason of its error."""
    try:
        return (await frame(await resumed(stub, session_id, next_frame))).index
    except grpc.aio.AioRpcError as error:
        return error_of(error).reason


@pytest.mark.parametrize("limit", [1, 16])
async def test_one_of_two_take_overs_at_once_has_the_stream(store: SessionStore, limit: int) -> None:
    capabilities = pb.GetCapabilitiesRequest()
    async with cell(store, limit) as (workers, here, there):
        for _ in range(3):
            session = await new_session(here, b"picture")
            call, _ = await open_stream(here, session.id, mode=LIVE)
            next_frame = (await frame(call)).index + 1
            async with asyncio.timeout(WAIT_S):
                both = (first_frame_or_reason(there, session.id, next_frame) for _ in range(2))
                outcomes = set(await asyncio.gather(*both))
                assert next_frame in outcomes
                assert outcomes <= {next_frame, "SESSION_BUSY", "CONNECTION_LOST"}
                async with refused("SESSION_BUSY"):
                    await rest(call)
                assert workers.num_streams == 1
                await here.DeleteSession(pb.DeleteSessionRequest(session_id=session.id))
                # It ends in the other gateway, and the registry has it a moment later.
                while not (await here.GetCapabilities(capabilities)).free_sessions:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)


async def test_a_take_over_that_fails_leaves_the_stream_where_it_was(store: SessionStore) -> None:
    gone = {"vae": ("127.0.0.1:1",)}
    async with cell(store, limit=1, second=gone) as (_, here, there):
        session = await new_session(here, b"picture")
        call, _ = await open_stream(here, session.id, mode=LIVE)
        last = await frame(call)
        async with refused("STAGE_LOST"):
            await resumed(there, session.id, last.index + 1)
        call.cancel()
        again = await resumed(here, session.id, last.index + 1)
        following = await frame(again)
        assert (following.index, following.is_discontinuity) == (last.index + 1, False)
        again.cancel()


class FailingVae(VaeServicer):
    """A decoder that opens no stream."""

    async def Decode(
        self, requests: AsyncIterator[vae_pb2.DecodeRequest], context: Context
    ) -> AsyncGenerator[vae_pb2.DecodeResponse, None]:
        raise StageFailed("the decoder is broken")
        yield


async def test_a_take_over_that_fails_after_it_has_the_slots_gives_them_back(store: SessionStore) -> None:
    with DeviceQueue() as queue:
        broken = FailingVae(Stage("vae", Step(0.002), queue, limit=1, history_blocks=3))
        async with (
            serving("127.0.0.1:0", broken) as port,
            cell(store, limit=1, second={"vae": (f"127.0.0.1:{port}",)}) as (_, here, there),
        ):
            session = await new_session(here, b"picture")
            call, _ = await open_stream(here, session.id, mode=LIVE)
            last = await frame(call)
            async with refused("STAGE_FAILED"):
                await resumed(there, session.id, last.index + 1)
            await send(call, pieces(bytes(3 * 15360)))
            async with asyncio.timeout(WAIT_S):
                block = (await store.position(session.id)).next_block
                while (await store.position(session.id)).next_block < block + 2:
                    last = await frame(call)
            call.cancel()


async def test_a_take_over_that_fails_with_the_store_leaves_the_stream_to_any_gateway(
    store: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise StoreUnavailable("the session store cannot be reached")

    async with cell(store, limit=1) as (workers, here, there):
        session = await new_session(here, b"picture")
        call, _ = await open_stream(here, session.id, mode=LIVE)
        last = await frame(call)
        for stub in (here, there):
            with monkeypatch.context() as patch:
                patch.setattr(Claim, "commit", fail)
                patch.setattr(Claim, "release", fail)
                async with refused("STORE_UNAVAILABLE"):
                    await resumed(there, session.id, last.index + 1)
            async with asyncio.timeout(WAIT_S):
                call = await resumed(stub, session.id, last.index + 1)
                last, before = await frame(call), last
                assert last.index == before.index + 1
        assert workers.num_streams == 1
        call.cancel()


async def test_a_stream_can_be_resumed_elsewhere_before_its_first_block(store: SessionStore) -> None:
    async with cell(store, limit=1) as (_, here, there):
        session = await new_session(here, b"picture")
        await open_stream(here, session.id)
        call = await resumed(there, session.id, 3)
        await send(call, pieces(bytes(40000)))
        assert (await frame(call)).index == 3


async def test_a_time_to_live_is_set_at_any_gateway(store: SessionStore) -> None:
    async with cell(store, limit=1) as (_, here, there):
        session = await new_session(here, b"picture")
        call, _ = await open_stream(here, session.id, mode=LIVE)
        await frame(call)
        session.ttl.FromSeconds(777)
        await there.UpdateSession(pb.UpdateSessionRequest(session=session, update_mask=FieldMask(paths=["ttl"])))
        await send(call, pieces(bytes(3 * 15360)))
        before = (await store.position(session.id)).next_block
        async with asyncio.timeout(WAIT_S):
            while (await store.position(session.id)).next_block < before + 2:
                await frame(call)
        for stub in (here, there):
            kept = (await stub.GetSession(pb.GetSessionRequest(session_id=session.id))).session
            assert kept.ttl.seconds == 777
        assert (await store.status(session.id)).expires_in_s > 700
        call.cancel()


async def test_a_session_that_is_deleted_elsewhere_ends_at_once(store: SessionStore) -> None:
    async with cell(store, limit=1) as (workers, here, there):
        session = await new_session(here, b"picture")
        call, _ = await open_stream(here, session.id, mode=LIVE)
        await frame(call)
        await there.DeleteSession(pb.DeleteSessionRequest(session_id=session.id))
        async with asyncio.timeout(2), refused("SESSION_NOT_FOUND"):
            await rest(call)
        async with refused("SESSION_NOT_FOUND"):
            await resumed(there, session.id, 4)
        assert workers.num_streams == 0


@pytest.mark.parametrize("next_frame", [0, 2])
async def test_nobody_resumes_before_the_first_frame(store: SessionStore, next_frame: int) -> None:
    async with cell(store, limit=1) as (_, here, there):
        session = await new_session(here, b"picture")
        call, _ = await open_stream(here, session.id, mode=LIVE)
        await frame(call)
        for stub in (here, there):
            async with refused("INVALID_FIELD") as refusal:
                await resumed(stub, session.id, next_frame)
            assert refusal.fields == ["open.resume.next_frame"]
        assert (await stub.GetSession(pb.GetSessionRequest(session_id=session.id))).session.state == (
            types.Session.STATE_STREAMING
        )
        call.cancel()


async def test_one_of_two_connections_at_once_has_the_stream_at_its_own_gateway(store: SessionStore) -> None:
    async with cell(store, limit=1) as (_, here, _):
        session = await new_session(here, b"picture")
        call, _ = await open_stream(here, session.id, mode=LIVE)
        next_frame = (await frame(call)).index + 1
        async with asyncio.timeout(WAIT_S):
            for _ in range(3):
                both = (first_frame_or_reason(here, session.id, next_frame) for _ in range(2))
                assert set(await asyncio.gather(*both)) in ({next_frame}, {next_frame, "CONNECTION_LOST"})


async def test_in_a_full_store_streams_continue_and_move_and_new_ones_are_refused(
    store: SessionStore, redis_client: Redis
) -> None:
    async with cell(store, limit=2) as (_, here, there):
        session = await new_session(here, b"picture")
        call, _ = await open_stream(here, session.id, mode=LIVE)
        await frame(call)
        await redis_client.config_set("maxmemory", 1)
        try:
            async with refused("STORE_UNAVAILABLE") as refusal:
                await new_session(here, b"another picture")
            assert "the session store is full" in refusal.message
            async with refused("STORE_UNAVAILABLE"):
                await here.CreateSession(pb.CreateSessionRequest(reference_id=session.reference_id))
            await send(call, pieces(bytes(3 * 15360)))
            before, last = (await store.position(session.id)).next_block, await frame(call)
            async with asyncio.timeout(WAIT_S):
                while (await store.position(session.id)).next_block < before + 2:
                    last = await frame(call)
                moved = await resumed(there, session.id, last.index + 1)
                assert (await frame(moved)).index == last.index + 1
            await there.DeleteSession(pb.DeleteSessionRequest(session_id=session.id))
        finally:
            await redis_client.config_set("maxmemory", 0)
        assert await new_session(here, b"another picture")


async def test_a_stream_whose_last_frames_are_still_to_be_read_goes_on_elsewhere(store: SessionStore) -> None:
    """Everything is rendered, and the client has closed the stream, but it has not received its end."""
    async with (
        cell(store, limit=1) as (workers, here, there),
        grpc.aio.insecure_channel(workers.target, options=SMALL) as channel,
    ):
        slow: Stub = pb_grpc.AvatarServiceStub(channel)
        session = await new_session(here, b"picture")
        call, _ = await open_stream(slow, session.id)
        await send(call, [*pieces(bytes(3 * 15360)), CLOSE])
        last = await frame(call)
        async with asyncio.timeout(WAIT_S):
            while (await store.position(session.id)).next_block < 3:  # noqa: ASYNC110
                await asyncio.sleep(0.01)  # it is written after each block
            moved = await resumed(there, session.id, last.index + 1)
            await finish(moved, [CLOSE])
        assert (await store.position(session.id)).is_closed
