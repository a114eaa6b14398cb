"""Tests of avatar.failover.pool: the worker of the next stream, while workers come, go and hang."""

import asyncio
import random
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc.aio
import pytest

from avatar.errors import NoCapacity, StageLost
from avatar.failover import addresses as addresses_module
from avatar.failover import pool as pool_module
from avatar.failover.pool import Worker as PoolWorker
from avatar.failover.pool import WorkerPool
from avatar.rpc.server import serving
from avatar.worker.v1 import audio_pb2 as pb
from avatar.worker.v1 import audio_pb2_grpc
from services.local.processes import free_ports
from tests.rpc.conftest import Worker

Audio = WorkerPool[pb.AudioServiceGetInfoResponse]


async def get_info(connection: grpc.aio.Channel) -> pb.AudioServiceGetInfoResponse:
    response: pb.AudioServiceGetInfoResponse = await audio_pb2_grpc.AudioServiceStub(connection).GetInfo(
        pb.AudioServiceGetInfoRequest(), timeout=pool_module.ANSWER_S
    )
    return response


@asynccontextmanager
async def workers(count: int) -> AsyncGenerator[list[Worker], None]:
    """Run workers that report no streams of their own."""
    found = [Worker() for _ in range(count)]
    async with AsyncExitStack() as stack:
        for worker in found:
            worker.info = lambda: pb.AudioServiceGetInfoResponse(capacity=4)
            port = await stack.enter_async_context(serving("127.0.0.1:0", worker))
            worker.target = f"127.0.0.1:{port}"
        yield found


class FirstChoice(random.Random):
    """Chooses the first of equally loaded workers."""

    def choice(self, seq: Any) -> Any:
        return seq[0]


@asynccontextmanager
async def pooled(*found: Worker) -> AsyncGenerator[Audio, None]:
    """Run a pool over these workers, without a registry. Of equally loaded ones it chooses the first."""
    audio: Audio = WorkerPool("audio", [each.target for each in found], get_info)
    audio._rng = FirstChoice()
    async with audio.running():
        await audio.refresh()
        yield audio


def targets_of(audio: Audio) -> list[str]:
    return [worker.target for worker, _ in audio.answering(lambda _: True)]


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while True:
            if is_so():
                return
            await asyncio.sleep(0.005)


def taken(
    at: list[str], refuse: Callable[[str], Exception | None] = lambda _: None
) -> Callable[[Any, int | None], Awaitable[str]]:
    """Return a function that opens a stream, which stays open, and appends its worker's target."""

    async def open_at(worker: PoolWorker[Any], _: int | None) -> str:
        if error := refuse(worker.target):
            raise error
        at.append(worker.target)
        return worker.target

    return open_at


async def test_streams_are_spread_over_workers() -> None:
    at: list[str] = []
    async with workers(3) as found, pooled(*found) as audio:
        for _ in range(6):
            await audio.open(taken(at))
    assert {target: at.count(target) for target in at} == {each.target: 2 for each in found}


async def test_streams_of_other_processes_count() -> None:
    at: list[str] = []
    async with workers(2) as (busy, idle):
        busy.info = lambda: pb.AudioServiceGetInfoResponse(capacity=4, active=3)
        async with pooled(busy, idle) as audio:
            for _ in range(3):
                await audio.open(taken(at))
    assert at == [idle.target] * 3


async def test_a_refused_stream_is_opened_at_the_next_worker_and_no_capacity_is_raised_first() -> None:
    at: list[str] = []
    no = NoCapacity("full", retry_s=1.0)
    async with workers(2) as (full, other), pooled(full, other) as audio:
        await audio.open(taken(at, lambda target: no if target == full.target else None))
        assert at == [other.target]
        with pytest.raises(NoCapacity):
            await audio.open(taken(at, lambda target: no if target == full.target else StageLost("gone")))
        # The worker that was lost is polled again, and answers.
        await audio.refresh()
        assert await audio.open(taken(at)) is not None


async def test_a_missing_worker_is_skipped_and_a_new_one_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool_module, "ASK_EVERY_S", 0.05)
    port = free_ports(1)[0]
    audio: Audio = WorkerPool("audio", [f"127.0.0.1:{port}"], get_info)
    async with audio.running():
        with pytest.raises(StageLost, match=rf"audio: no worker answers at 127.0.0.1:{port}") as none:
            await audio.workers()
        assert none.value.metadata == {"stage": "audio"}
        worker = Worker()
        async with serving(f"127.0.0.1:{port}", worker), asyncio.timeout(20):
            while True:
                try:
                    await audio.workers()
                    break
                except StageLost:
                    await asyncio.sleep(0.05)


async def test_a_name_with_two_addresses_is_two_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses_module, "RESOLVE_EVERY_S", 0.02)
    port = free_ports(1)[0]
    hosts = ["127.0.0.1", "127.0.0.2"]

    async def resolved(_: Any, host: str, at: int, **__: Any) -> list[Any]:
        assert host == "audio.test"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, at)) for each in hosts]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", resolved)
    audio: Audio = WorkerPool("audio", [f"dns:///audio.test:{port}"], get_info)
    async with (
        serving(f"127.0.0.1:{port}", Worker()),
        serving(f"127.0.0.2:{port}", Worker()),
        audio.running(),
    ):
        assert {worker.target for worker, _ in await audio.workers()} == {f"{host}:{port}" for host in hosts}
        hosts.remove("127.0.0.1")
        await until(lambda: targets_of(audio) == [f"127.0.0.2:{port}"])


async def test_a_refresh_does_not_wait_for_a_worker_whose_address_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses_module, "RESOLVE_EVERY_S", 0.02)
    monkeypatch.setattr(pool_module, "REPORT_EVERY_S", 0.02)
    port = free_ports(1)[0]
    hosts = ["127.0.0.1", "127.0.0.2"]

    async def resolved(_: Any, __: str, at: int, **___: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, at)) for each in hosts]

    asked = asyncio.Event()

    async def unanswered(connection: grpc.aio.Channel) -> Any:
        asked.set()
        await connection.stream_stream("/avatar.worker.v1.AudioService/Encode")().read()

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", resolved)
    audio: Audio = WorkerPool("audio", [f"audio.test:{port}"], unanswered)
    async with (
        serving(f"127.0.0.1:{port}", Worker()),
        serving(f"127.0.0.2:{port}", Worker()),
        audio.running(),
        asyncio.timeout(20),
    ):
        await asked.wait()
        waiting = asyncio.get_running_loop().create_task(audio.refresh())
        await asyncio.sleep(0)
        hosts[:] = ["127.0.0.3"]
        monkeypatch.setattr(audio, "_get_info", get_info)
        await waiting


async def test_streams_of_a_worker_that_hangs_are_notified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "ASK_EVERY_S", 0.05)

    async def unanswered(connection: grpc.aio.Channel) -> Any:
        await connection.stream_stream("/avatar.worker.v1.AudioService/Encode")(timeout=0.2).read()

    async with workers(1) as found, pooled(*found) as audio:
        worker, _ = await audio.open(taken([]))
        notified = asyncio.Event()
        worker.on_silence.add(notified.set)
        await audio.refresh()
        assert not notified.is_set()
        monkeypatch.setattr(audio, "_get_info", unanswered)
        async with asyncio.timeout(20):
            await notified.wait()


async def test_a_worker_lost_while_another_is_tried_is_skipped() -> None:
    async with workers(2) as found, pooled(*found) as audio:

        async def open_at(worker: PoolWorker[Any], _: int | None) -> str:
            assert worker.info is not None
            for other, __ in await audio.workers():
                other.mark_lost()
            raise StageLost("gone")

        with pytest.raises(StageLost, match="gone"):
            await audio.open(open_at)
