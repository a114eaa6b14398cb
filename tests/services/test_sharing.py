"""Tests of streams that share a worker's device, over real gRPC: the order of their blocks, and admission."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from unittest.mock import Mock

import grpc
import grpc.aio
import pytest
import torch

from avatar.errors import NoCapacity
from avatar.rpc.channel import channel
from avatar.rpc.client import remote_vae
from avatar.rpc.codec import tensor_to_pb
from avatar.rpc.server import serving
from avatar.runtime.device_queue import DeviceQueue
from avatar.settings import VaeSettings
from avatar.types import FrameChunk, LatentFrame
from avatar.vae.vae import Vae, VaeState
from avatar.worker.v1 import types_pb2 as types
from avatar.worker.v1 import vae_pb2 as pb
from avatar.worker.v1 import vae_pb2_grpc
from services.vae.__main__ import build
from tests.busy import WAIT_S, busy, until_waiting

SESSIONS = ["first", "second", "third", "fourth"]


@pytest.fixture
def queue() -> Iterator[DeviceQueue]:
    with DeviceQueue() as queue:
        yield queue


@pytest.fixture
async def worker(checkpoint: Path, queue: DeviceQueue) -> AsyncGenerator[grpc.aio.Channel, None]:
    """A channel to a VAE worker with that queue."""
    servicer = build(VaeSettings(checkpoint=checkpoint, capacity=5), queue)
    async with serving("127.0.0.1:0", servicer) as port, channel(f"127.0.0.1:{port}") as target:
        yield target


def opening(name: str, *, is_live: bool = False) -> pb.OpenDecode:
    session = types.Session(id=name, width=64, height=64, motion=tensor_to_pb(torch.zeros(16, 19, 8, 8)))
    return pb.OpenDecode(session_id=name, is_live=is_live, session=session)


async def active_and_capacity(worker: grpc.aio.Channel) -> tuple[int, int]:
    """Return the worker's number of open streams, and its capacity."""
    info = await vae_pb2_grpc.VaeServiceStub(worker).GetInfo(pb.VaeServiceGetInfoRequest())
    return info.active, info.capacity


async def test_blocks_run_by_the_slack_that_they_arrive_with(
    worker: grpc.aio.Channel, queue: DeviceQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    step = Vae.step

    def recording(self: Vae[object], latent: LatentFrame, state: VaeState[object]) -> FrameChunk:
        order.append(latent.traceparent)
        return step(self, latent, state)

    opened = Mock(wraps=Vae.open)
    monkeypatch.setattr(Vae, "open", lambda *arguments: opened(*arguments))
    monkeypatch.setattr(Vae, "step", recording)

    async def decode(name: str, start: asyncio.Event, *, is_live: bool = False, slack_s: float | None = None) -> None:
        stage = remote_vae(worker)
        await stage.open(opening(name, is_live=is_live))

        async def blocks() -> AsyncGenerator[types.Block, None]:
            await start.wait()
            latent = tensor_to_pb(torch.zeros(16, 3, 8, 8))
            yield types.Block(index=0, latent=latent, traceparent=name, slack_s=slack_s)

        assert [frame async for frame in stage(blocks())]

    events = {name: asyncio.Event() for name in SESSIONS}
    streams = [
        decode("first", events["first"]),
        decode("second", events["second"], is_live=True),  # due a block from now
        decode("third", events["third"], slack_s=60),
        decode("fourth", events["fourth"], is_live=True, slack_s=-1),
    ]
    async with asyncio.TaskGroup() as tasks, asyncio.timeout(WAIT_S):
        for each in streams:
            tasks.create_task(each)
        while opened.call_count < len(streams):  # noqa: ASYNC110 - the model has no event for it
            await asyncio.sleep(0)
        await queue.run(int)  # the last state is open
        with busy(queue):
            for number, name in enumerate(SESSIONS, 1):
                events[name].set()
                await until_waiting(queue, number)
    assert list(dict.fromkeys(order)) == ["fourth", "second", "third", "first"]


async def test_a_live_stream_that_would_delay_the_others_is_refused(
    worker: grpc.aio.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avatar.runtime.admission.LIVE_SHARE", 1e9)
    assert await active_and_capacity(worker) == (0, 5)
    monkeypatch.setattr("avatar.runtime.admission.LIVE_SHARE", 1e-9)
    assert await active_and_capacity(worker) == (0, 1), "a session alone at the device is accepted"
    first, second, third, fourth = (remote_vae(worker) for _ in SESSIONS)
    await first.open(opening("first", is_live=True))
    with pytest.raises(NoCapacity, match="no time for another live stream") as refusal:
        await second.open(opening("second", is_live=True))
    assert refusal.value.retry_s
    await third.open(opening("third"))  # offline: it uses the time that is left
    assert await active_and_capacity(worker) == (2, 2)
    first.cancel()
    async with asyncio.timeout(WAIT_S):
        while (await active_and_capacity(worker))[0] > 1:
            pass
    await fourth.open(opening("fourth", is_live=True))
    for stage in (third, fourth):
        stage.cancel()


async def test_a_stream_that_ends_cancels_its_waiting_block(worker: grpc.aio.Channel, queue: DeviceQueue) -> None:
    stage = remote_vae(worker)
    await stage.open(opening("first"))

    async def blocks() -> AsyncGenerator[types.Block, None]:
        yield types.Block(index=0, latent=tensor_to_pb(torch.zeros(16, 3, 8, 8)))
        await asyncio.Event().wait()

    await queue.run(int)  # the stream's state is open
    with busy(queue):
        frames = asyncio.ensure_future(anext(stage(blocks())))
        await until_waiting(queue, 1)
        stage.cancel()
        await until_waiting(queue, 0)
    await asyncio.wait({frames})
    assert frames.cancelled() or frames.exception()
