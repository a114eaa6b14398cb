"""Tests of services.registration: a worker's state in the registry follows the worker, and is gone with it."""

import asyncio
from collections.abc import Callable

import pytest

from avatar.store.redis import RedisHashes
from avatar.store.registry import WorkerRegistry
from avatar.worker.v1 import audio_pb2
from avatar.worker.v1.discovery_pb2 import WorkerStates
from services import registration
from services.registration import registered
from tests.proxy import proxied
from tests.rpc.conftest import Worker as AudioWorker

LIMIT_S = 20.0


class Worker(AudioWorker):
    """An audio worker with as many streams as a test sets."""

    stage = "audio"

    def __init__(self) -> None:
        super().__init__()
        self.changed = asyncio.Event()
        self.num_streams = 0
        self.info = lambda: audio_pb2.AudioServiceGetInfoResponse(active=self.num_streams)

    def open(self) -> None:
        self.num_streams += 1
        self.changed.set()


async def read_until(registry: WorkerRegistry, is_so: Callable[[WorkerStates], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while True:
            if is_so(await registry.read()):
                return
            await asyncio.sleep(0.005)


async def logged(caplog: pytest.LogCaptureFixture, num_lines: int) -> list[str]:
    """Return the log once it has so many lines."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            if len(caplog.messages) >= num_lines:
                return caplog.messages
            await asyncio.sleep(0.01)


async def test_a_change_is_written_before_the_next_heartbeat_and_the_end_removes_the_state(
    hashes: RedisHashes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registration, "HEARTBEAT_S", 1e6)
    registry, worker = WorkerRegistry(hashes, "main"), Worker()
    async with registered(registry, "here:1", worker):
        await read_until(registry, lambda states: [each.address for each in states.workers] == ["here:1"])
        for _ in range(3):
            worker.open()
        await read_until(registry, lambda states: states.workers[0].audio.active == 3)
    assert not (await registry.read()).workers


async def test_a_heartbeat_repeats_the_state(hashes: RedisHashes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "HEARTBEAT_S", 0.01)
    registry, worker = WorkerRegistry(hashes, "main"), Worker()
    async with registered(registry, "here:1", worker):
        await read_until(registry, lambda states: bool(states.workers))
        await registry.remove("audio", "here:1")
        await read_until(registry, lambda states: bool(states.workers))


async def test_a_worker_serves_on_without_the_store_and_logs_one_line_each_way(
    redis: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registration, "HEARTBEAT_S", 0.01)
    caplog.set_level("INFO")
    async with proxied(redis.removeprefix("redis://")) as proxy:
        hashes, worker = RedisHashes(f"redis://{proxy.target}"), Worker()
        registry = WorkerRegistry(hashes, "main")
        proxy.leave()

        async with registered(registry, "here:1", worker):
            assert await logged(caplog, 1) == ["worker not registered"]
            await asyncio.sleep(0.1)  # more attempts, which log nothing
            proxy.mend()
            assert await logged(caplog, 2) == ["worker not registered", "worker registered again"]
            assert (await registry.read()).workers
        await hashes.aclose()


async def test_an_unforeseen_error_is_logged_once_and_the_worker_is_registered_after_it(
    hashes: RedisHashes, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registration, "HEARTBEAT_S", 0.01)
    caplog.set_level("INFO")
    worker = Worker()
    worker.num_streams = 1 << 32  # more than the message can carry
    async with registered(WorkerRegistry(hashes, "main"), "here:1", worker):
        assert await logged(caplog, 1) == ["worker not registered"]
        await asyncio.sleep(0.1)  # more attempts, which log nothing
        worker.num_streams = 1
        assert await logged(caplog, 2) == ["worker not registered", "worker registered again"]
    assert "ValueError" in caplog.text
