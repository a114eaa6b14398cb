"""Sessions that continue when a worker, the gateway or the store is lost while they stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from redis.asyncio import Redis

from avatar.settings import GatewaySettings
from avatar.store.sessions import SessionStore
from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import types_pb2 as types
from services.local.suite import gateway, suite, workers
from tests.conftest import RATE_HZ, UnreliableHashes, speech
from tests.product import (
    CLOSE,
    Streamed,
    connected,
    finish,
    listening,
    new_session,
    open_stream,
    pieces,
    read_frames,
    send,
)
from tests.proxy import Proxy, proxied
from tests.refusals import refused
from tests.services.test_suite import SECONDS, rendered

SETTINGS = GatewaySettings(listen="127.0.0.1:0", stall_s=60.0)
# The checkpoint's window is three blocks: a stream this young is rebuilt from all of its blocks.
YOUNG_FRAMES = 10
FRAME_BYTES = 2 * RATE_HZ // 25


@dataclass
class Breakable:
    """A gateway's HOST:PORT, and a proxy for each stage of `STAGES`, through which the gateway reaches its worker."""

    target: str
    proxies: dict[str, Proxy]


@asynccontextmanager
async def breakable(checkpoint: Path, store: SessionStore, *stages: str) -> AsyncGenerator[Breakable, None]:
    async with workers(checkpoint, store, SETTINGS, denoisers=("0", "1", "2")) as given, AsyncExitStack() as stack:
        proxies: dict[str, Proxy] = {}
        for stage in stages:
            first, *others = getattr(given, stage)
            proxies[stage] = await stack.enter_async_context(proxied(first))
            given = given.model_copy(update={stage: (proxies[stage].target, *others)})
        yield Breakable(await stack.enter_async_context(gateway(store, given)), proxies)


@asynccontextmanager
async def half_spoken(
    target: str, picture: bytes, data: bytes, num_frames: int, heard: bytes = b""
) -> AsyncGenerator[Streamed, None]:
    """Stream speech until there are so many frames, run the body, then stream the rest. heard: what it listens to.

    Until the body runs, the stream is sent what those frames need but not all, so that no stage has finished by then.
    """
    cut = (num_frames + 24) * FRAME_BYTES
    async with connected(target) as stub:
        session = await new_session(stub, picture, seed=7)
        call, _ = await open_stream(stub, session.id)
        streamed = Streamed()
        await send(call, listening(data[:cut], heard[:cut]))
        await read_frames(call, streamed, num_frames)
        yield streamed
        await finish(call, [*listening(data[cut:], heard[cut:]), CLOSE], streamed)
    assert streamed.indexes == list(range(3, 3 + len(streamed.frames))), "no frame is lost, none is repeated"


def jumps(streamed: Streamed) -> list[int]:
    """Return the indexes of the frames that are marked as discontinuities."""
    return [each.index for each in streamed.frames if each.is_discontinuity]


@pytest.mark.parametrize("stage", ["audio", "vae"])
async def test_losing_the_audio_worker_or_the_vae_changes_no_frame(
    checkpoint: Path, store: SessionStore, picture: bytes, stage: str
) -> None:
    async with (
        breakable(checkpoint, store, stage) as broken,
        half_spoken(broken.target, picture, speech(SECONDS), 50) as streamed,
    ):
        broken.proxies[stage].cut()
    assert streamed.pixels == rendered(checkpoint, picture, speech(SECONDS), seed=7)
    assert len(jumps(streamed)) == 1
    assert streamed.closed.num_blocks == 7
    assert [each.num_blocks for each in streamed.closed.stages] == [7] * 5


async def test_losing_all_stages_of_a_young_session_at_once_changes_no_frame(
    checkpoint: Path, store: SessionStore, picture: bytes
) -> None:
    async with (
        breakable(checkpoint, store, "audio", "denoisers", "vae") as broken,
        half_spoken(broken.target, picture, speech(SECONDS), YOUNG_FRAMES) as streamed,
    ):
        for proxy in broken.proxies.values():
            proxy.cut()
    assert streamed.pixels == rendered(checkpoint, picture, speech(SECONDS), seed=7)
    assert len(jumps(streamed)) == 1


async def test_an_old_session_continues_when_a_level_is_lost(
    checkpoint: Path, store: SessionStore, picture: bytes
) -> None:
    data = speech(2 * SECONDS)
    async with (
        breakable(checkpoint, store, "denoisers") as broken,
        half_spoken(broken.target, picture, data, 80) as streamed,
    ):
        broken.proxies["denoisers"].cut()
    whole = rendered(checkpoint, picture, data, seed=7)
    [jump] = jumps(streamed)
    assert len(streamed.pixels) == len(whole)
    assert streamed.pixels[: jump - 3] == whole[: jump - 3]


@pytest.mark.parametrize("sink_update_block", [2, 11], ids=["sink updated before", "sink updated after"])
async def test_a_session_continues_at_another_gateway(
    checkpoint: Path, store: SessionStore, picture: bytes, sink_update_block: int
) -> None:
    """The client sends unacknowledged audio again; frames continue without a gap, from an empty window."""
    requests = [*pieces(speech(2 * SECONDS)), CLOSE]
    streamed = Streamed()
    async with (
        workers(checkpoint, store, SETTINGS) as given,
        gateway(store, given) as first,
        gateway(store, given) as second,
        connected(first) as stub,
        connected(second) as other,
    ):
        session = await new_session(stub, picture, seed=7, sink_update_block=sink_update_block)
        lost, _ = await open_stream(stub, session.id)
        await send(lost, requests[:-1])
        await read_frames(lost, streamed, 80)
        next_frame = streamed.indexes[-1] + 1
        call, opened = await open_stream(other, session.id, resume=pb.ResumeAvatar(next_frame=next_frame))
        assert 0 < opened.num_messages < len(requests)
        await finish(call, requests[opened.num_messages :], streamed)
        unread = Streamed()
        async with refused("SESSION_BUSY"):
            async for response in lost:
                unread.add(response)
        state = (await other.GetSession(pb.GetSessionRequest(session_id=session.id))).session.state
    assert streamed.indexes == list(range(3, 3 + len(streamed.frames)))
    assert jumps(streamed) == [next_frame]
    assert streamed.closed.num_frames == len(streamed.frames), "those of both gateways"
    # Frames that the first gateway sent and the client did not read need not be made again, and some on their way are
    # lost. How many of those that were sent are known to the second gateway depends on the machine.
    assert 0 <= 13 * 12 - (3 + len(streamed.frames)) <= len(unread.frames) + 48
    whole = rendered(checkpoint, picture, speech(2 * SECONDS), seed=7, sink_update_block=sink_update_block)
    assert streamed.pixels[:80] == whole[:80]
    assert state == types.Session.STATE_CLOSED


async def test_a_stream_continues_without_its_store_and_restores_it_afterwards(
    checkpoint: Path, unreliable: UnreliableHashes, redis_client: Redis, picture: bytes
) -> None:
    """The sink's update and the position are restored too, even if no other block follows."""
    store, data = SessionStore(unreliable), speech(SECONDS)
    streamed = Streamed()
    async with suite(checkpoint, store, SETTINGS) as target, connected(target) as stub:
        session = await new_session(stub, picture, seed=7)
        call, _ = await open_stream(stub, session.id)
        unreliable.is_lost = True
        await redis_client.flushdb()
        async with refused("STORE_UNAVAILABLE"):
            await stub.GetSession(pb.GetSessionRequest(session_id=session.id), timeout=10)
        await send(call, pieces(data))
        await read_frames(call, streamed, 48)
        num_failures = unreliable.num_failures
        async with asyncio.timeout(20):
            while unreliable.num_failures == num_failures:  # noqa: ASYNC110
                await asyncio.sleep(0.05)  # until the gateway has failed to write the last position
            unreliable.is_lost = False
            while not await unreliable.expires_in_s(f"avatar:session:{{{session.id}}}"):  # noqa: ASYNC110
                await asyncio.sleep(0.05)  # it happens in the gateway: there is no event to wait for
        assert (await store.conditions(session.id, 1)).version == 1, "the sink's update"
        assert (await store.position(session.id)).next_frame >= 48
        await finish(call, [CLOSE], streamed)
    assert streamed.pixels == rendered(checkpoint, picture, data, seed=7)
    assert not jumps(streamed)


async def test_streams_are_rebuilt_while_the_store_is_away(
    checkpoint: Path, unreliable: UnreliableHashes, picture: bytes
) -> None:
    """The gateway keeps all that they are opened with."""
    async with (
        breakable(checkpoint, SessionStore(unreliable), "denoisers", "vae") as broken,
        half_spoken(broken.target, picture, speech(SECONDS), YOUNG_FRAMES) as streamed,
    ):
        unreliable.is_lost = True
        for proxy in broken.proxies.values():
            proxy.cut()
    assert streamed.pixels == rendered(checkpoint, picture, speech(SECONDS), seed=7)
    assert len(jumps(streamed)) == 1


async def test_a_store_that_is_emptied_between_two_blocks_is_restored(
    checkpoint: Path, store: SessionStore, redis_client: Redis, picture: bytes
) -> None:
    async with suite(checkpoint, store, SETTINGS) as target, connected(target) as stub:
        session = await new_session(stub, picture, seed=7)
        call, _ = await open_stream(stub, session.id)
        await redis_client.flushdb()
        streamed = Streamed()
        await send(call, pieces(speech(SECONDS)))
        await read_frames(call, streamed, 12)
        async with asyncio.timeout(20):
            while not await redis_client.exists(f"avatar:session:{{{session.id}}}"):  # noqa: ASYNC110
                await asyncio.sleep(0.05)  # it happens in the gateway: there is no event to wait for
        await finish(call, [CLOSE], streamed)
        assert (await store.session(session.id)).seed == 7
    assert streamed.pixels == rendered(checkpoint, picture, speech(SECONDS), seed=7)
