"""A connection that breaks, a client that does not read, and a gateway that stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from grpc import StatusCode

from avatar.settings import GatewaySettings
from avatar.store.sessions import SessionStore
from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import avatar_service_pb2_grpc as pb_grpc
from avatar.v1 import types_pb2 as types
from services.local.suite import suite
from tests.conftest import speech
from tests.contract.refusals import refused
from tests.product import (
    CLOSE,
    Call,
    Streamed,
    Stub,
    answer,
    connected,
    frame,
    new_session,
    opening,
    pieces,
    rest,
    speak,
)

LIVE = pb.OpenAvatar.MODE_LIVE
# What a client takes before it reads.
SMALL = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16384)]
SETTINGS = GatewaySettings(listen="127.0.0.1:0", resume_s=2.0, max_unread_s=0.5)


@pytest.fixture
async def target(checkpoint: Path, store: SessionStore) -> AsyncGenerator[str, None]:
    """A gateway that waits for nobody long."""
    async with suite(checkpoint, store, SETTINGS) as target:
        yield target


async def begun(stub: Stub, session_id: str, **options: Any) -> Call:
    call = stub.StreamAvatar(timeout=60)
    await call.write(opening(session_id, **options))
    await answer(call)
    return call


async def resumed(stub: Stub, session_id: str, next_frame: int) -> tuple[Call, pb.AvatarOpened]:
    call = stub.StreamAvatar(timeout=60)
    resume = pb.ResumeAvatar(next_frame=next_frame)
    await call.write(pb.StreamAvatarRequest(open=pb.OpenAvatar(session_id=session_id, resume=resume)))
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
    call = await begun(stub, session.id)
    for request in pieces(data[:40000]):
        await call.write(request)
    pixels = [(await frame(call)).data for _ in range(5)]
    if ending == "cancel":
        call.cancel()
    elif ending == "done_writing":
        await call.done_writing()
        async with refused(StatusCode.CANCELLED, "CONNECTION_LOST"):
            await rest(call)
        assert await state(stub, session.id) == types.Session.STATE_DETACHED
    again, told = await resumed(stub, session.id, 3 + len(pixels))
    assert await state(stub, session.id) == types.Session.STATE_STREAMING
    for request in [*pieces(data[2 * told.num_samples :]), CLOSE]:
        await again.write(request)
    got = Streamed()
    for response in await rest(again):
        got.take(response)
    assert [each.index for each in got.frames] == list(range(8, 48))
    assert pixels + got.pixels == whole.pixels
    assert got.closed.num_frames == 45
    if ending == "half-open":
        async with refused(StatusCode.CANCELLED, "CONNECTION_LOST"):
            await rest(call)


async def test_a_frame_that_is_no_longer_kept_or_not_yet_sent_cannot_be_resumed_from(
    stub: Stub, portrait: bytes
) -> None:
    session = await new_session(stub, portrait)
    call = await begun(stub, session.id)
    for request in pieces(speech(4.8)):
        await call.write(request)
    for _ in range(80):
        await frame(call)
    async with refused(StatusCode.OUT_OF_RANGE, "RESUME_IMPOSSIBLE"):
        await resumed(stub, session.id, 3)
    async with refused(StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") as refusal:
        await resumed(stub, session.id, 1 << 40)
    assert refusal.fields == ["open.resume.next_frame"]
    assert (await frame(call)).index == 83, "the stream that is open does not notice"


async def test_a_session_that_nobody_resumes_is_closed(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    call = await begun(stub, session.id, mode=LIVE)
    await frame(call)
    call.cancel()
    await until_closed(stub, session.id)
    for options in ({}, {"resume": pb.ResumeAvatar(next_frame=3)}):
        async with refused(StatusCode.FAILED_PRECONDITION, "SESSION_CLOSED"):
            await begun(stub, session.id, **options)


async def test_who_resumes_may_not_choose_otherwise(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    call = await begun(stub, session.id, mode=LIVE)
    again = stub.StreamAvatar(timeout=10)
    resume = pb.ResumeAvatar(next_frame=3)
    await again.write(opening(session.id, mode=pb.OpenAvatar.MODE_OFFLINE, resume=resume))
    async with refused(StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") as refusal:
        await rest(again)
    assert refusal.fields == ["open.mode"]
    assert (await frame(call)).index == 3


@pytest.mark.parametrize("mode", [LIVE, pb.OpenAvatar.MODE_OFFLINE])
async def test_a_client_that_does_not_read_is_told_and_let_go_and_others_go_on(
    checkpoint: Path, store: SessionStore, portrait: bytes, mode: pb.OpenAvatar.Mode.ValueType
) -> None:
    settings = SETTINGS.model_copy(update={"max_unread_s": 0.3})
    async with suite(checkpoint, store, settings) as target, connected(target) as stub:
        session = await new_session(stub, portrait)
        async with grpc.aio.insecure_channel(target, options=SMALL) as channel:
            slow: Stub = pb_grpc.AvatarServiceStub(channel)
            call = await begun(slow, session.id, mode=mode)
            for request in pieces(speech(3.9), 1 << 15):
                await call.write(request)
            await until_closed(stub, session.id)
            assert (await speak(stub, (await new_session(stub, portrait)).id, speech(0.48))).frames
            got: list[pb.StreamAvatarResponse] = []
            async with refused(StatusCode.ABORTED, "SLOW_READER"):
                while isinstance(response := await call.read(), pb.StreamAvatarResponse):
                    got.append(response)
            assert sum(each.HasField("frame") for each in got) < 40


async def test_a_client_that_reads_late_is_told_and_has_every_frame(
    checkpoint: Path, store: SessionStore, portrait: bytes
) -> None:
    async with AsyncExitStack() as stack:
        target = await stack.enter_async_context(
            suite(checkpoint, store, SETTINGS.model_copy(update={"max_unread_s": 30.0}))
        )
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(target, options=SMALL))
        stub: Stub = pb_grpc.AvatarServiceStub(channel)
        call = await begun(stub, (await new_session(stub, portrait)).id, mode=LIVE)
        await asyncio.sleep(4)
        got: list[pb.StreamAvatarResponse] = []
        while not got or got[-1].event.notice.kind != pb.Notice.KIND_SLOW_READER:
            got.append(await answer(call))
        indexes = [each.frame.index for each in got if each.HasField("frame")]
        assert indexes == list(range(3, 3 + len(indexes)))
        assert got[-1].event.notice.within_s == 30.0
        call.cancel()


async def test_clients_are_told_when_the_gateway_stops(checkpoint: Path, store: SessionStore, portrait: bytes) -> None:
    async def read(call: Call) -> list[pb.StreamAvatarResponse]:
        got = []
        while isinstance(response := await call.read(), pb.StreamAvatarResponse):
            got.append(response)
            if response.event.HasField("notice"):
                await call.write(CLOSE)
        return got

    async with AsyncExitStack() as client:
        async with suite(checkpoint, store, SETTINGS.model_copy(update={"drain_s": 5.0})) as target:
            stub = await client.enter_async_context(connected(target))
            session = await new_session(stub, portrait)
            reading = asyncio.ensure_future(read(await begun(stub, session.id, mode=LIVE)))
            await asyncio.sleep(0.3)
        got = await reading
    notices = [each.event.notice for each in got if each.event.HasField("notice")]
    assert [(each.kind, each.within_s) for each in notices] == [(pb.Notice.KIND_GOING_AWAY, 5.0)]
    assert got[-1].HasField("closed")
