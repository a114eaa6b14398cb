"""Workers, gateways and stores that are lost in the middle of a session, which goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from grpc import StatusCode
from redis.asyncio import Redis

from avatar.errors import StoreUnavailable
from avatar.settings import GatewaySettings
from avatar.store.redis import RedisHashes
from avatar.store.sessions import SessionStore
from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import types_pb2 as types
from services.local.suite import gateway, workers
from tests.conftest import RATE_HZ, speech
from tests.contract.refusals import refused
from tests.product import CLOSE, PCM16, Call, Streamed, Stub, answer, connected, new_session, opening, pieces, rest
from tests.rpc.conftest import cuttable
from tests.services.test_suite import SECONDS, rendered

SETTINGS = GatewaySettings(listen="127.0.0.1:0", stall_s=60.0)
# The checkpoint's window is three blocks: a stream this young is rebuilt from all that it was given.
YOUNG_FRAME = 10
FRAME_BYTES = 2 * RATE_HZ // 25
STAGES = ["audio", "denoisers", "vae"]


class Breakable:
    """A gateway whose stages have two addresses each, the first of which can be cut off."""

    def __init__(self, target: str, cuts: dict[str, Any]) -> None:
        self.target = target
        self.cuts = cuts


@asynccontextmanager
async def breakable(checkpoint: Path, store: SessionStore, stages: list[str]) -> AsyncGenerator[Breakable, None]:
    async with workers(checkpoint, store, SETTINGS, denoisers=("0", "1", "2")) as given, AsyncExitStack() as stack:
        cuts: dict[str, Any] = {}
        for stage in stages:
            first, *others = getattr(given, stage)
            through, cuts[stage] = await stack.enter_async_context(cuttable(first))
            addresses: dict[str, Any] = {stage: (through, first, *others)}
            given = given.model_copy(update=addresses)
        yield Breakable(await stack.enter_async_context(gateway(store, given)), cuts)


async def spoken_through(
    target: str, picture: bytes, data: bytes, after: int, happens: Any, audio: Any = PCM16
) -> Streamed:
    """A whole session in which something happens after so many frames."""
    out = Streamed()
    async with connected(target) as stub:
        session = await new_session(stub, picture, seed=7)
        call = stub.StreamAvatar(timeout=60)
        await call.write(opening(session.id, audio))
        await answer(call)
        # What those frames need, and not all: no stage may be done with the session before it is lost.
        for request in pieces(data[: (after + 24) * FRAME_BYTES]):
            await call.write(request)
        while len(out.frames) < after:
            out.take(await answer(call))
        happens()
        for request in [*pieces(data[(after + 24) * FRAME_BYTES :]), CLOSE]:
            await call.write(request)
        for response in await rest(call):
            out.take(response)
    assert [each.index for each in out.frames] == list(range(3, 3 + len(out.frames))), "none is lost, none comes twice"
    return out


async def begun(stub: Stub, picture: bytes, **fields: Any) -> tuple[types.Session, Call]:
    """A session, with these further fields, whose stream is open."""
    session = await new_session(stub, picture, seed=7, **fields)
    call = stub.StreamAvatar(timeout=60)
    await call.write(opening(session.id))
    await answer(call)
    return session, call


def jumps(streamed: Streamed) -> list[int]:
    return [each.index for each in streamed.frames if each.is_discontinuity]


@pytest.mark.parametrize("stage", ["audio", "vae"])
@pytest.mark.parametrize("after", [YOUNG_FRAME, 50])
async def test_frames_are_the_same_when_the_worker_of_sound_or_frames_is_lost(
    checkpoint: Path, store: SessionStore, picture: bytes, stage: str, after: int
) -> None:
    async with breakable(checkpoint, store, [stage]) as suite:
        streamed = await spoken_through(suite.target, picture, speech(SECONDS), after, suite.cuts[stage])
    assert streamed.pixels == rendered(checkpoint, picture, speech(SECONDS), seed=7)
    assert len(jumps(streamed)) == 1
    assert streamed.closed.num_blocks == 7
    assert [each.num_blocks for each in streamed.closed.stages] == [7] * 5


async def test_frames_are_the_same_when_a_level_of_a_young_session_is_lost(
    checkpoint: Path, store: SessionStore, picture: bytes
) -> None:
    async with breakable(checkpoint, store, ["denoisers"]) as suite:
        streamed = await spoken_through(suite.target, picture, speech(SECONDS), YOUNG_FRAME, suite.cuts["denoisers"])
    assert streamed.pixels == rendered(checkpoint, picture, speech(SECONDS), seed=7)
    assert len(jumps(streamed)) == 1


async def test_an_old_session_goes_on_when_a_level_is_lost(
    checkpoint: Path, store: SessionStore, picture: bytes
) -> None:
    data = speech(2 * SECONDS)
    async with breakable(checkpoint, store, ["denoisers"]) as suite:
        streamed = await spoken_through(suite.target, picture, data, 80, suite.cuts["denoisers"])
    whole = rendered(checkpoint, picture, data, seed=7)
    [jump] = jumps(streamed)
    assert len(streamed.pixels) == len(whole)
    assert streamed.pixels[: jump - 3] == whole[: jump - 3]


async def test_all_stages_are_lost_at_once(checkpoint: Path, store: SessionStore, picture: bytes) -> None:
    async with breakable(checkpoint, store, STAGES) as suite:

        def cut_all() -> None:
            for cut in suite.cuts.values():
                cut()

        streamed = await spoken_through(suite.target, picture, speech(SECONDS), YOUNG_FRAME, cut_all)
    assert streamed.pixels == rendered(checkpoint, picture, speech(SECONDS), seed=7)
    assert len(jumps(streamed)) == 1


@pytest.mark.parametrize("sink_update_block", [2, 11], ids=["sink updated before", "sink updated after"])
async def test_a_session_goes_on_at_another_gateway(
    checkpoint: Path, store: SessionStore, picture: bytes, sink_update_block: int
) -> None:
    """It receives again the audio that was not shown; its frames go on, and its window starts anew."""
    requests = [*pieces(speech(2 * SECONDS)), CLOSE]
    out = Streamed()
    async with (
        workers(checkpoint, store, SETTINGS) as given,
        gateway(store, given) as first,
        gateway(store, given) as second,
        connected(first) as stub,
        connected(second) as other,
    ):
        session, lost = await begun(stub, picture, sink_update_block=sink_update_block)
        for request in requests:
            await lost.write(request)
        while len(out.frames) < 80:
            out.take(await answer(lost))
        call = other.StreamAvatar(timeout=60)
        next_frame = out.frames[-1].index + 1
        await call.write(opening(session.id, resume=pb.ResumeAvatar(next_frame=next_frame)))
        told = (await answer(call)).opened
        assert 0 < told.num_messages < len(requests)
        for request in requests[told.num_messages :]:
            await call.write(request)
        for response in await rest(call):
            out.take(response)
        async with refused(StatusCode.FAILED_PRECONDITION, "SESSION_BUSY"):
            await rest(lost)
        state = (await other.GetSession(pb.GetSessionRequest(session_id=session.id))).session.state
    assert [each.index for each in out.frames] == list(range(3, 3 + len(out.frames)))
    assert jumps(out) == [next_frame]
    # Frames that the first gateway had sent and the client had not read are not made again.
    assert 0 <= 13 * 12 - (3 + len(out.frames)) <= 48
    whole = rendered(checkpoint, picture, speech(2 * SECONDS), seed=7, sink_update_block=sink_update_block)
    assert out.pixels[:80] == whole[:80]
    assert state == types.Session.STATE_CLOSED


class UnreliableHashes(RedisHashes):
    """Hashes in a Redis server that is unreachable while `is_lost`."""

    is_lost = False

    def _call(self) -> AbstractAsyncContextManager[None]:
        if self.is_lost:
            raise StoreUnavailable("the session store cannot be reached", retry_s=1.0)
        return super()._call()


@pytest.fixture
async def unreliable(redis: str) -> AsyncGenerator[UnreliableHashes, None]:
    hashes = UnreliableHashes(redis)
    yield hashes
    await hashes.aclose()


async def test_a_session_that_runs_does_not_miss_its_store(
    checkpoint: Path, unreliable: UnreliableHashes, redis_client: Redis, picture: bytes
) -> None:
    """Not even for the sink's update; and it is there again, with everything, when the store is back."""
    store, data = SessionStore(unreliable), speech(SECONDS)
    out = Streamed()
    async with (
        workers(checkpoint, store, SETTINGS) as given,
        gateway(store, given) as target,
        connected(target) as stub,
    ):
        session, call = await begun(stub, picture)
        unreliable.is_lost = True
        await redis_client.flushdb()
        async with refused(StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE"):
            await stub.GetSession(pb.GetSessionRequest(session_id=session.id), timeout=10)
        for request in pieces(data):
            await call.write(request)
        while len(out.frames) < 48:
            out.take(await answer(call))
        unreliable.is_lost = False
        async with asyncio.timeout(20):
            while not await unreliable.expires_in_s(f"avatar:session:{{{session.id}}}"):  # noqa: ASYNC110
                await asyncio.sleep(0.05)  # it happens in the gateway: there is no event to wait for
        assert (await store.conditions(session.id, 1)).version == 1, "the sink's update"
        await call.write(CLOSE)
        for response in await rest(call):
            out.take(response)
    assert out.pixels == rendered(checkpoint, picture, data, seed=7)
    assert not jumps(out)


async def test_a_store_that_is_back_is_told_how_far_a_session_came_meanwhile(
    checkpoint: Path, unreliable: UnreliableHashes, picture: bytes
) -> None:
    """Also if no other block comes."""
    store, out = SessionStore(unreliable), Streamed()
    async with (
        workers(checkpoint, store, SETTINGS) as given,
        gateway(store, given) as target,
        connected(target) as stub,
    ):
        session, call = await begun(stub, picture)
        unreliable.is_lost = True
        for request in pieces(speech(SECONDS)):
            await call.write(request)
        while len(out.frames) < 48:
            out.take(await answer(call))
        await asyncio.sleep(1.5)  # the gateway has tried to write the last of them, and not succeeded
        unreliable.is_lost = False
        async with asyncio.timeout(10):
            while (await store.position(session.id)).next_frame < 48:  # noqa: ASYNC110
                await asyncio.sleep(0.05)  # it happens in the gateway: there is no event to wait for
        await call.write(CLOSE)
        await rest(call)


async def test_a_store_that_is_emptied_between_two_blocks_is_told_again(
    checkpoint: Path, store: SessionStore, redis_client: Redis, picture: bytes
) -> None:
    data = speech(SECONDS)
    async with (
        workers(checkpoint, store, SETTINGS) as given,
        gateway(store, given) as target,
        connected(target) as stub,
    ):
        session, call = await begun(stub, picture)
        await redis_client.flushdb()
        out = Streamed()
        for request in [*pieces(data), CLOSE]:
            await call.write(request)
        for response in await rest(call):
            out.take(response)
        assert (await store.session(session.id)).seed == 7
    assert out.pixels == rendered(checkpoint, picture, data, seed=7)
