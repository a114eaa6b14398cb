"""Memory of a device for streams of denoisers and decoders; an allocator with a cap stands in for the device's."""

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import torch

from avatar.aio import background
from avatar.checkpoints.layouts import open_part
from avatar.denoiser.denoiser import Denoiser
from avatar.denoiser.model import load
from avatar.errors import NoCapacity
from avatar.rpc.channel import channel
from avatar.rpc.client import RemoteStage, remote_denoiser, remote_vae
from avatar.rpc.codec import block_to_wire, conditions_to_pb, tensor_to_pb
from avatar.rpc.server import serving
from avatar.rpc.wire import RelayedBlock
from avatar.runtime.device_memory import DeviceMemory
from avatar.settings import DenoiserSettings, GatewaySettings, VaeSettings
from avatar.store.sessions import SessionStore
from avatar.types import Session
from avatar.vae.vae import Vae, VaeState
from avatar.vae.vae import load as load_vae
from avatar.worker.v1 import denoiser_pb2_grpc, types_pb2
from avatar.worker.v1.denoiser_pb2 import DenoiserServiceGetInfoRequest, OpenDenoise
from avatar.worker.v1.vae_pb2 import OpenDecode
from services.denoiser.__main__ import build
from services.denoiser.service import DenoiserServicer
from services.local.suite import suite
from services.vae.__main__ import build as build_vae
from services.worker import open_device_queue
from tests.capped_allocator import CappedAllocator
from tests.conftest import speech
from tests.handoff.chains import blocks_of, first_conditions, message_of, random_session
from tests.product import CLOSE, connected, finish, new_session, open_stream, pieces, speak
from tests.refusals import refused

SMALL, LARGE = (8, 8), (16, 16)
NUM_CYCLES = 20


@pytest.fixture
def allocator() -> Iterator[CappedAllocator]:
    allocator = CappedAllocator(float("inf"))
    with allocator.installed():
        yield allocator


@asynccontextmanager
async def denoiser(
    checkpoint: Path, store: SessionStore, **settings: Any
) -> AsyncGenerator[tuple[DenoiserServicer, grpc.aio.Channel], None]:
    """Run level 0's denoiser while the body runs; yield it and a channel to it."""
    given = DenoiserSettings(checkpoint=checkpoint, levels="0", **settings)
    with open_device_queue(given) as queue:
        servicer = build(given, store, queue)
        async with serving("127.0.0.1:0", servicer) as port, channel(f"127.0.0.1:{port}") as connection:
            yield servicer, connection


def session_of(number: int, size: tuple[int, int]) -> Session:
    return Session(f"session {number}", number, torch.zeros(16, 1, *size))


async def opened(connection: grpc.aio.Channel, session: Session) -> RemoteStage[Any, Any]:
    stage = remote_denoiser(connection, 0)
    await stage.open(OpenDenoise(session_id=session.id, session=message_of(session)))
    return stage


async def block_0(session: Session, checkpoint: Path) -> AsyncGenerator[RelayedBlock, None]:
    message = block_to_wire(blocks_of(session, checkpoint)[0])
    message.head.carried.CopyFrom(conditions_to_pb(first_conditions(session)))
    yield message


async def until_no_streams(connection: grpc.aio.Channel) -> int:
    """Wait until a worker has no stream; return its capacity."""
    stub = denoiser_pb2_grpc.DenoiserServiceStub(connection)
    async with asyncio.timeout(30):
        while True:
            info = await stub.GetInfo(DenoiserServiceGetInfoRequest(), timeout=10)
            if not info.active:
                return int(info.capacity)
            await asyncio.sleep(0.01)


async def until_freed(memory: DeviceMemory) -> None:
    """Wait until the states of all streams are freed; a handler's frame may outlive its stream by a moment."""
    async with asyncio.timeout(30):
        while memory.reserved_bytes:
            await asyncio.sleep(0.01)
            gc.collect()


async def test_streams_are_refused_before_they_are_opened_when_memory_is_short(
    checkpoint: Path, store: SessionStore
) -> None:
    async with denoiser(checkpoint, store) as (unlimited, _):
        num_bytes = unlimited._stream_bytes(*SMALL)
    async with denoiser(checkpoint, store, memory_gb=2.5 * num_bytes / 1e9) as (servicer, connection):
        assert await until_no_streams(connection) == 2
        first, second = [await opened(connection, session_of(number, SMALL)) for number in range(2)]
        with pytest.raises(NoCapacity, match="GB of memory for streams"):
            await opened(connection, session_of(2, SMALL))
        first.cancel()
        second.cancel()
        await until_freed(servicer._queue.load.memory)
        (await opened(connection, session_of(2, SMALL))).cancel()


async def test_a_size_that_does_not_fit_leaves_the_worker_open_to_smaller_ones(
    checkpoint: Path, store: SessionStore
) -> None:
    async with denoiser(checkpoint, store) as (unlimited, _):
        num_bytes = unlimited._stream_bytes(*SMALL)
    limit = 2.5 * num_bytes
    assert unlimited._stream_bytes(*LARGE) > limit
    async with denoiser(checkpoint, store, sizes="64x64,128x128", memory_gb=limit / 1e9) as (_, connection):
        assert await until_no_streams(connection) == 2
        with pytest.raises(NoCapacity, match="GB of memory for streams"):
            await opened(connection, session_of(0, LARGE))
        assert await until_no_streams(connection) == 2
        (await opened(connection, session_of(1, SMALL))).cancel()


async def test_memory_is_reserved_while_a_cancelled_streams_step_runs(
    checkpoint: Path, store: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with denoiser(checkpoint, store) as (unlimited, _):
        num_bytes = unlimited._stream_bytes(*SMALL)
    is_running, may_end, step, session = threading.Event(), threading.Event(), Denoiser.step, random_session("a", 1)

    def wait(*arguments: Any) -> Any:
        is_running.set()
        assert may_end.wait(30)
        return step(*arguments)

    async with denoiser(checkpoint, store, memory_gb=1.5 * num_bytes / 1e9) as (servicer, connection):
        monkeypatch.setattr(Denoiser, "step", wait)
        memory, stage = servicer._queue.load.memory, await opened(connection, session)
        try:
            async with background(anext(stage(block_0(session, checkpoint)))):
                await asyncio.to_thread(is_running.wait, 30)
            await until_no_streams(connection)
            assert memory.reserved_bytes == num_bytes, "of the state that the step uses"
            with pytest.raises(NoCapacity, match="GB of memory for streams"):
                await opened(connection, session_of(1, SMALL))
        finally:
            may_end.set()
        await until_freed(memory)
        (await opened(connection, session_of(1, SMALL))).cancel()


async def test_cycles_of_mixed_sizes_leave_memory_as_it_was(
    checkpoint: Path, store: SessionStore, allocator: CappedAllocator
) -> None:
    async with denoiser(checkpoint, store) as (unlimited, _):
        small, large = (unlimited._stream_bytes(*size) for size in (SMALL, LARGE))
    limit = large + 2 * small + small // 2
    async with denoiser(checkpoint, store, memory_gb=limit / 1e9) as (servicer, connection):
        gc.collect()
        at_start, allocator.cap = allocator.allocated, allocator.allocated + limit
        accepted = []
        for cycle in range(NUM_CYCLES):
            sizes = [LARGE, *[SMALL] * 4] if cycle % 2 else [*[SMALL] * 3, LARGE, *[SMALL] * 3]
            async with AsyncExitStack() as stack:
                accepted.append(0)
                for number, size in enumerate(sizes):
                    try:
                        stage = await opened(connection, session_of(number, size))
                    except NoCapacity:
                        continue
                    stack.callback(stage.cancel)
                    accepted[-1] += 1
            await until_no_streams(connection)
            async with asyncio.timeout(30):
                while allocator.allocated != at_start:  # a handler's frame may outlive its stream by a moment
                    await asyncio.sleep(0.05)
                    gc.collect()
            assert servicer._queue.load.memory.reserved_bytes == 0
        assert accepted[2:] == accepted[:2] * (NUM_CYCLES // 2 - 1), accepted
        assert accepted[1] == 3, "the large one and two small ones"


@pytest.mark.parametrize("method", ["open", "step"])
async def test_out_of_memory_is_no_capacity_and_frees_the_slot(
    method: str, checkpoint: Path, store: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    session, opened_by = random_session("a", 1), list[str]()

    async def answers(connection: grpc.aio.Channel) -> int:
        stage = await opened(connection, session)
        opened_by.append(method)
        return len([each async for each in stage(block_0(session, checkpoint))])

    async with denoiser(checkpoint, store) as (_, connection):
        with monkeypatch.context() as patch:
            patch.setattr(Denoiser, method, fail)
            with pytest.raises(NoCapacity, match="has no memory left"):
                await answers(connection)
            assert opened_by == ([] if method == "open" else ["step"]), "the allocation comes before the answer"
        await until_no_streams(connection)
        assert await answers(connection) == 1


async def test_a_decoders_state_is_reserved_before_its_stream_is_opened_and_until_it_is_freed(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    motion = tensor_to_pb(torch.zeros(16, 19, *SMALL))
    opens = OpenDecode(session_id="a", session=types_pb2.Session(id="a", width=64, height=64, motion=motion))
    states: list[weakref.ref[VaeState[Any]]] = []
    open_state = Vae.open

    def opening(self: Vae[Any], session: Session) -> VaeState[Any]:
        states.append(weakref.ref(state := open_state(self, session)))
        return state

    vae = load_vae(open_part(checkpoint, "vae"))
    state = vae.open(Session("a", 0, torch.zeros(16, 19, *SMALL)))
    num_bytes = vae.codec.state_bytes(state.decoder)
    assert num_bytes == vae.pixel_bytes() * SMALL[0] * SMALL[1] > 0
    given = VaeSettings(checkpoint=checkpoint, memory_gb=1.5 * num_bytes / 1e9)
    with open_device_queue(given) as queue:
        servicer = build_vae(given, queue)
        memory = queue.load.memory
        async with serving("127.0.0.1:0", servicer) as port, channel(f"127.0.0.1:{port}") as connection:
            assert servicer.info().capacity == 1
            stage = remote_vae(connection)
            await stage.open(opens)
            assert memory.reserved_bytes == num_bytes
            with pytest.raises(NoCapacity, match="GB of memory for streams"):
                await remote_vae(connection).open(opens)
            stage.cancel()
            await until_freed(memory)
            monkeypatch.setattr(Vae, "open", opening)
            frames = remote_vae(connection)
            await frames.open(opens)
            block = types_pb2.Block(latent=tensor_to_pb(torch.zeros(16, 3, *SMALL)))
            assert [each async for each in frames(_only(block))]
            await until_freed(memory)
            assert [each() for each in states] == [None]


async def _only(block: types_pb2.Block) -> AsyncGenerator[types_pb2.Block, None]:
    yield block


async def test_a_client_gets_no_capacity_for_a_lack_of_memory(
    checkpoint: Path, store: SessionStore, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = load(open_part(checkpoint, "denoiser"))
    state, shared = Denoiser(network, network.config, 0).memory(*SMALL)
    limit = 1.5 * (network.config.num_levels * state + shared)
    settings = GatewaySettings(listen="127.0.0.1:0")
    num_steps = 0

    def fail(*_: Any) -> None:
        nonlocal num_steps
        num_steps += 1
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    async with suite(checkpoint, store, settings, memory_gb=limit / 1e9) as target, connected(target) as stub:
        first, second = [await new_session(stub, picture) for _ in range(2)]
        call, _ = await open_stream(stub, first.id)
        async with refused("NO_CAPACITY"):
            await speak(stub, second.id, speech(0.48))
        monkeypatch.setattr(Denoiser, "step", fail)
        async with refused("NO_CAPACITY"):
            await finish(call, [*pieces(speech(0.48)), CLOSE])
        assert num_steps == 1, "the stream is not rebuilt into the same lack"
