"""Connections that break and resume, clients that do not read, and gateways that stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import Any

import grpc.aio
import pytest

from avatar.settings import GatewaySettings
from avatar.store.sessions import SessionStore
from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import avatar_service_pb2_grpc as pb_grpc
from avatar.v1 import types_pb2 as types
from services.local.suite import gateway
from tests.conftest import speech
from tests.product import (
    CLOSE,
    PCM16,
    Call,
    Streamed,
    Stub,
    answer,
    connected,
    finish,
    frame,
    new_session,
    open_stream,
    pieces,
    read_frames,
    rest,
    send,
    speak,
)
from tests.refusals import refused

LIVE = pb.OpenAvatar.MODE_LIVE
# Options of a channel that buffers little before its client reads.
SMALL = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16384)]
TIMEOUTS = {"resume_s": 2.0, "max_unread_s": 1.0}


@pytest.fixture
async def target(shared_workers: GatewaySettings, store: SessionStore) -> AsyncGenerator[str, None]:
    """A gateway with short timeouts."""
    async with gateway(store, shared_workers.model_copy(update=TIMEOUTS)) as target:
        yield target


async def resume(stub: Stub, session_id: str, next_frame: int, **options: Any) -> tuple[Call, pb.AvatarOpened]:
    """Resume a stream as it was opened, or with these options."""
    opening = pb.OpenAvatar(session_id=session_id, resume=pb.ResumeAvatar(next_frame=next_frame), **options)
    call = stub.StreamAvatar(timeout=60)
    await call.write(pb.StreamAvatarRequest(open=opening))
    return call, (await answer(call)).opened


async def state(stub: Stub, session_id: str) -> types.Session.State.ValueType:
    return (await stub.GetSession(pb.GetSessionRequest(session_id=session_id), timeout=10)).session.state


async def until_closed(stub: Stub, session_id: str) -> None:
    async with asyncio.timeout(30):
        while await state(stub, session_id) != types.Session.STATE_CLOSED:  # noqa: ASYNC110
            await asyncio.sleep(0.1)  # it happens in the gateway: there is no event to wait for


@pytest.mark.parametrize("ending", ["cancel", "done_writing", "half-open"])
async def test_a_resumed_stream_has_the_frames_of_an_unbroken_one(stub: Stub, portrait: bytes, ending: str) -> None:
    data = speech(1.92)
    whole = await speak(stub, (await new_session(stub, portrait, seed=1)).id, data)
    session = await new_session(stub, portrait, seed=1)
    call, _ = await open_stream(stub, session.id)
    await send(call, pieces(data[:40000]))
    streamed = Streamed()
    await read_frames(call, streamed, 5)
    if ending == "cancel":
        call.cancel()
    elif ending == "done_writing":
        await call.done_writing()
        async with refused("CONNECTION_LOST"):
            await rest(call)
        assert await state(stub, session.id) == types.Session.STATE_DETACHED
    again, opened = await resume(stub, session.id, 8)
    assert await state(stub, session.id) == types.Session.STATE_STREAMING
    await finish(again, [*pieces(data[2 * opened.num_samples :]), CLOSE], streamed)
    assert streamed.indexes == list(range(3, 48))
    assert streamed.pixels == whole.pixels
    assert streamed.closed.num_frames == 45
    if ending == "half-open":
        async with refused("CONNECTION_LOST"):
            await rest(call)


async def test_only_a_kept_frame_can_be_resumed_from(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    call, _ = await open_stream(stub, session.id)
    await send(call, pieces(speech(4.8)))
    await read_frames(call, Streamed(), 80)
    async with refused("RESUME_IMPOSSIBLE"):
        await resume(stub, session.id, 3)
    async with refused("INVALID_FIELD") as refusal:
        await resume(stub, session.id, 1 << 40)
    assert refusal.fields == ["open.resume.next_frame"]
    assert (await frame(call)).index == 83, "the open stream is not disturbed"


async def test_a_session_closes_if_it_is_not_resumed_in_time(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    call, _ = await open_stream(stub, session.id, mode=LIVE)
    await frame(call)
    call.cancel()
    await until_closed(stub, session.id)
    async with refused("SESSION_CLOSED"):
        await open_stream(stub, session.id)
    async with refused("SESSION_CLOSED"):
        await resume(stub, session.id, 3)


async def test_a_resumption_with_other_options_is_refused(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    call, _ = await open_stream(stub, session.id, mode=LIVE)
    async with refused("INVALID_FIELD") as refusal:
        await resume(stub, session.id, 3, mode=pb.OpenAvatar.MODE_OFFLINE)
    assert refusal.fields == ["open.mode"]
    async with refused("INVALID_FIELD") as refusal:
        await resume(stub, session.id, 3, listen=PCM16)
    assert refusal.fields == ["open.listen"]
    assert (await frame(call)).index == 3


@pytest.mark.parametrize("mode", [LIVE, pb.OpenAvatar.MODE_OFFLINE])
async def test_a_client_that_does_not_read_is_disconnected_and_others_are_served(
    target: str, stub: Stub, portrait: bytes, mode: pb.OpenAvatar.Mode.ValueType
) -> None:
    session = await new_session(stub, portrait)
    async with grpc.aio.insecure_channel(target, options=SMALL) as channel:
        slow: Stub = pb_grpc.AvatarServiceStub(channel)
        call, _ = await open_stream(slow, session.id, mode=mode)
        await send(call, pieces(speech(3.9), 1 << 15))
        await until_closed(stub, session.id)
        assert (await speak(stub, (await new_session(stub, portrait)).id, speech(0.48))).frames
        streamed = Streamed()
        async with refused("SLOW_READER"):
            await read_frames(call, streamed, 1000)
        assert len(streamed.frames) < 40


async def test_a_client_that_reads_late_is_notified_and_gets_every_frame(
    shared_workers: GatewaySettings, store: SessionStore, portrait: bytes
) -> None:
    async with (
        gateway(store, shared_workers.model_copy(update={"max_unread_s": 10.0})) as target,
        grpc.aio.insecure_channel(target, options=SMALL) as channel,
    ):
        stub: Stub = pb_grpc.AvatarServiceStub(channel)
        call, _ = await open_stream(stub, (await new_session(stub, portrait)).id, mode=LIVE)
        await asyncio.sleep(4)
        streamed = Streamed()
        while not streamed.events or streamed.events[-1].notice.kind != pb.Notice.KIND_SLOW_READER:
            streamed.add(await answer(call))
        assert streamed.indexes == list(range(3, 3 + len(streamed.frames)))
        assert streamed.events[-1].notice.within_s == 10.0
        call.cancel()


async def test_clients_are_notified_when_the_gateway_stops(
    shared_workers: GatewaySettings, store: SessionStore, portrait: bytes
) -> None:
    streamed = Streamed()

    async def read(call: Call) -> None:
        async for response in call:
            streamed.add(response)
            if response.event.HasField("notice"):
                await call.write(CLOSE)

    async with AsyncExitStack() as client:
        async with gateway(store, shared_workers.model_copy(update={"drain_s": 5.0})) as target:
            stub = await client.enter_async_context(connected(target))
            call, _ = await open_stream(stub, (await new_session(stub, portrait)).id, mode=LIVE)
            reading = asyncio.ensure_future(read(call))
            await asyncio.sleep(0.3)
        await reading
    notices = [event.notice for event in streamed.events if event.HasField("notice")]
    assert [(each.kind, each.within_s) for each in notices] == [(pb.Notice.KIND_GOING_AWAY, 5.0)]
    assert streamed.closed.num_blocks
