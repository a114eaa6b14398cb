"""Tests of avatar.failover.discovery and of pools over it: states of the registry, questions, and names."""

import asyncio
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import pytest

from avatar.errors import NoCapacity, StageLost
from avatar.failover import addresses as addresses_module
from avatar.failover import discovery as discovery_module
from avatar.failover import pool as pool_module
from avatar.failover.discovery import Discovery
from avatar.failover.placement import MAX_UNKNOWN
from avatar.failover.pool import Worker, WorkerPool
from avatar.store.redis import RedisHashes
from avatar.store.registry import WorkerRegistry
from avatar.worker.v1 import audio_pb2 as pb
from avatar.worker.v1.discovery_pb2 import WorkerState, WorkerStates
from tests.failover.test_pool import FirstChoice, targets_of, until
from tests.proxy import proxied

Audio = WorkerPool[pb.AudioServiceGetInfoResponse]
ONE, TWO, THREE = "127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"


class Fleet:
    """The registry that a test writes, a pool that reads it, and the questions that the pool asks.

    silent: targets that do not answer questions, which end after silent_s; others answer with `answer`.
    """

    def __init__(self, hashes: RedisHashes, targets: list[str]) -> None:
        self.registry = WorkerRegistry(hashes, "main")
        self.discovery = Discovery(self.registry.read)
        self.pool: Audio = WorkerPool("audio", targets, self._get_info, None, self.discovery)
        self.pool._rng = FirstChoice()
        self.asked: list[str] = []
        self.silent: set[str] = set()
        self.silent_s = 0.05
        self.answer = pb.AudioServiceGetInfoResponse(capacity=4, digest="asked")

    async def write(self, target: str, active: int = 0, capacity: int = 4) -> None:
        state = WorkerState(address=target)
        state.audio.CopyFrom(pb.AudioServiceGetInfoResponse(active=active, capacity=capacity, digest="registered"))
        await self.registry.write(state)

    async def _get_info(self, connection: Any) -> pb.AudioServiceGetInfoResponse:
        self.asked.append(connection)
        if connection in self.silent:
            await asyncio.sleep(self.silent_s)
            raise grpc.aio.AioRpcError(grpc.StatusCode.DEADLINE_EXCEEDED, grpc.aio.Metadata(), grpc.aio.Metadata())
        return self.answer

    def worker(self, target: str) -> Worker[Any]:
        return self.pool._workers[target]

    def digest(self, target: str) -> str:
        """Return the digest that a worker's description has: its source."""
        info = self.worker(target).info
        assert info is not None
        return str(info.digest)

    @asynccontextmanager
    async def running(self) -> AsyncGenerator["Fleet", None]:
        async with self.pool.running(), self.discovery.running():
            yield self


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short periods, and targets in place of channels."""
    monkeypatch.setattr(discovery_module, "READ_EVERY_S", 0.02)
    monkeypatch.setattr(discovery_module, "FRESH_S", 0.0)
    monkeypatch.setattr(discovery_module, "SETTLE_S", 0.0)
    monkeypatch.setattr(pool_module, "ASK_EVERY_S", 0.02)
    monkeypatch.setattr(pool_module, "DOUBT_S", 0.02)
    monkeypatch.setattr(Worker, "channel", property(lambda worker: worker.target))
    monkeypatch.setattr(Worker, "aclose", _nothing)


async def _nothing(_: Worker[Any]) -> None:
    pass


async def test_registered_workers_are_not_asked_and_their_states_are_followed(hashes: RedisHashes) -> None:
    fleet = Fleet(hashes, [ONE, TWO])
    await fleet.write(ONE, active=1)
    await fleet.write(TWO, active=3)
    async with fleet.running():
        assert [worker.target for worker, _ in await fleet.pool.workers()] == [ONE, TWO]
        await fleet.write(ONE, active=4)
        await until(lambda: fleet.worker(ONE).load.num_free(is_live=True) == 0)
        assert [worker.target for worker, _ in await fleet.pool.workers()] == [TWO, ONE]
    assert fleet.asked == []


async def test_a_worker_without_a_state_is_asked_and_delays_no_other(hashes: RedisHashes) -> None:
    fleet = Fleet(hashes, [ONE, TWO, THREE])
    fleet.silent.add(TWO)
    await fleet.write(THREE)
    async with fleet.running():
        await until(lambda: sorted(targets_of(fleet.pool)) == [ONE, THREE])
        assert (fleet.digest(ONE), fleet.digest(THREE)) == ("asked", "registered")
        await until(lambda: fleet.asked.count(TWO) >= 3)
        assert THREE not in fleet.asked
        await fleet.write(ONE)
        await until(lambda: fleet.worker(ONE).load.is_registered)


async def test_workers_are_asked_beside_one_that_does_not_answer(hashes: RedisHashes) -> None:
    fleet = Fleet(hashes, [ONE, TWO, THREE])
    fleet.silent.add(ONE)
    fleet.silent_s = 3600.0
    async with fleet.running():
        await until(lambda: sorted(targets_of(fleet.pool)) == [TWO, THREE])
        assert fleet.asked.count(ONE) == 1, "its question is still open"


async def test_a_worker_that_writes_no_more_is_silent_only_if_it_does_not_answer(hashes: RedisHashes) -> None:
    fleet = Fleet(hashes, [ONE, TWO])
    await fleet.write(ONE)
    await fleet.write(TWO)
    async with fleet.running():
        notified = asyncio.Event()
        for target in (ONE, TWO):
            fleet.worker(target).on_silence.add(notified.set)
        await fleet.registry.remove("audio", ONE)  # it cannot reach Redis, or drains
        await until(lambda: ONE in fleet.asked)
        await until(lambda: not fleet.worker(ONE).load.is_doubtful)
        assert fleet.digest(ONE) == "asked"
        assert not notified.is_set()
        fleet.silent.add(TWO)  # frozen
        await fleet.registry.remove("audio", TWO)
        await until(notified.is_set)
        assert targets_of(fleet.pool) == [ONE]


async def test_a_worker_that_writes_late_is_chosen_last_and_not_asked(
    hashes: RedisHashes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "DOUBT_S", 60.0)
    fleet = Fleet(hashes, [ONE, TWO])
    await fleet.write(ONE)
    await fleet.write(TWO, active=3)
    async with fleet.running():
        await fleet.registry.remove("audio", ONE)
        await until(lambda: fleet.worker(ONE).load.is_doubtful)
        assert [worker.target for worker, _ in await fleet.pool.workers()] == [TWO, ONE]
        await fleet.write(ONE, active=1)
        await until(lambda: fleet.worker(ONE).load.num_streams == 1)
        assert [worker.target for worker, _ in await fleet.pool.workers()] == [ONE, TWO]
    assert fleet.asked == []


async def test_a_lost_worker_is_chosen_again_when_it_answers_and_not_by_its_old_state(hashes: RedisHashes) -> None:
    fleet = Fleet(hashes, [ONE])
    await fleet.write(ONE)
    async with fleet.running():
        fleet.silent.add(ONE)
        fleet.worker(ONE).mark_lost()
        await until(lambda: fleet.asked.count(ONE) >= 2)
        await fleet.discovery.refresh()
        assert targets_of(fleet.pool) == [], "its state is still in the registry"
        fleet.silent.clear()
        await until(lambda: fleet.worker(ONE).load.is_registered)


async def test_the_last_states_hold_while_redis_is_away(redis: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with proxied(redis.removeprefix("redis://")) as proxy:
        hashes = RedisHashes(f"redis://{proxy.target}")
        fleet = Fleet(hashes, [ONE])
        await fleet.write(ONE, active=2)
        async with fleet.running():
            proxy.leave()
            for _ in range(3):
                await fleet.discovery.refresh()
            assert targets_of(fleet.pool) == [ONE]
            assert fleet.asked == []
            proxy.mend()
            await fleet.write(ONE, active=3)
            await until(lambda: fleet.worker(ONE).load.num_streams == 3)
        await hashes.aclose()
    away, back = "registry of workers not read; the last states hold", "registry of workers read again"
    assert caplog.messages == [away, back]


async def test_workers_are_asked_if_redis_is_away_at_the_start(redis: str) -> None:
    async with proxied(redis.removeprefix("redis://")) as proxy:
        hashes = RedisHashes(f"redis://{proxy.target}")
        fleet = Fleet(hashes, [ONE])
        proxy.leave()
        async with fleet.running():
            assert [worker.target for worker, _ in await fleet.pool.workers()] == [ONE]
            proxy.mend()
            await fleet.write(ONE)
            await until(lambda: fleet.worker(ONE).load.is_registered)
        await hashes.aclose()


async def test_a_stage_that_nobody_serves_costs_one_shared_read(
    hashes: RedisHashes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery_module, "READ_EVERY_S", 1e6)
    fleet = Fleet(hashes, [ONE])
    await fleet.write(ONE)
    async with fleet.running():
        reads = 0
        read = fleet.registry.read

        async def counted() -> WorkerStates:
            nonlocal reads
            reads += 1
            return await read()

        fleet.discovery._read = counted
        serves = [fleet.pool.workers(lambda info: info.digest == "another") for _ in range(20)]
        results = await asyncio.gather(*serves, return_exceptions=True)
        assert all(isinstance(each, StageLost) for each in results)
        assert reads == 1
    assert fleet.asked == []


async def test_full_workers_are_known_and_a_refusals_numbers_are_taken_over(hashes: RedisHashes) -> None:
    fleet = Fleet(hashes, [ONE, TWO])
    await fleet.write(ONE)
    await fleet.write(TWO, active=4)
    bounds: list[tuple[str, int | None]] = []

    async def open_at(worker: Worker[Any], bound: int | None) -> str:
        bounds.append((worker.target, bound))
        if worker.target == ONE and len(bounds) == 1:
            raise NoCapacity("more than believed", metadata={"active": "2", "capacity": "4"})
        if worker.target == TWO:
            raise NoCapacity("full", metadata={"active": "4", "capacity": "4"})
        return worker.target

    async with fleet.running():
        assert not fleet.pool.is_full(is_live=True)
        assert fleet.pool.room(is_live=True) == 4
        assert (await fleet.pool.open(open_at))[1] == ONE
        assert bounds == [(ONE, MAX_UNKNOWN), (ONE, 2 + MAX_UNKNOWN)]
        assert fleet.worker(ONE).load.num_streams == 3
        await fleet.write(ONE, active=4)
        await until(lambda: fleet.pool.is_full(is_live=True))
        assert fleet.pool.room(is_live=True) == 0
        del bounds[:]
        fleet.worker(ONE).mark_lost()
        fleet.silent.add(ONE)
        with pytest.raises(NoCapacity) as refusal:
            await fleet.pool.open(open_at)
        assert bounds == [(TWO, 4 + MAX_UNKNOWN)]
        assert refusal.value.metadata == {}
        assert refusal.value.retry_s


async def test_a_name_that_is_not_resolved_keeps_its_workers_and_delays_no_other(
    hashes: RedisHashes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(addresses_module, "RESOLVE_EVERY_S", 0.01)
    hosts = {"a.test": "127.0.0.1", "b.test": "127.0.0.2"}
    hanging = asyncio.Event()
    failures = 0

    async def resolved(_: Any, host: str, port: int, **__: Any) -> list[Any]:
        nonlocal failures
        if host not in hosts:
            failures += 1
            if failures == 3:
                hanging.set()
                await asyncio.sleep(3600)
            raise socket.gaierror(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (hosts[host], port))]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", resolved)
    monkeypatch.setattr(addresses_module, "RESOLVE_S", 0.3)
    fleet = Fleet(hashes, ["a.test:7", "b.test:7", THREE])
    async with fleet.running():
        await until(lambda: set(targets_of(fleet.pool)) == {"127.0.0.1:7", "127.0.0.2:7", THREE})
        del hosts["a.test"]
        await until(hanging.is_set)
        hosts["b.test"] = "127.0.0.3"
        await until(lambda: set(targets_of(fleet.pool)) == {"127.0.0.1:7", "127.0.0.3:7", THREE})
        hosts["a.test"] = "127.0.0.4"
        await until(lambda: set(targets_of(fleet.pool)) == {"127.0.0.4:7", "127.0.0.3:7", THREE})
    messages = [each for each in caplog.messages if "resolved" in each]
    assert messages == ["name not resolved; its workers are kept", "name resolved again"]


async def test_an_unforeseen_error_of_a_read_is_logged_once_and_the_next_read_is_tried(
    hashes: RedisHashes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    fleet = Fleet(hashes, [ONE])
    await fleet.write(ONE, active=2)
    async with fleet.running():
        with monkeypatch.context() as broken:
            broken.setattr(Worker, "update", lambda *_, **__: 1 / 0)
            async with asyncio.timeout(20):
                await asyncio.gather(*(fleet.discovery.refresh() for _ in range(5)))
                await fleet.discovery.refresh()
        assert targets_of(fleet.pool) == [ONE]
        await fleet.write(ONE, active=3)
        await until(lambda: fleet.worker(ONE).load.num_streams == 3)
    away, back = "registry of workers not read; the last states hold", "registry of workers read again"
    assert caplog.messages == [away, back]
    assert "ZeroDivisionError" in caplog.text


async def test_an_unforeseen_error_of_the_first_read_does_not_prevent_the_start(
    hashes: RedisHashes, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = Fleet(hashes, [ONE])
    await fleet.write(ONE)

    async def broken() -> WorkerStates:
        raise KeyError("broken")

    read, fleet.discovery._read = fleet.discovery._read, broken
    async with fleet.running():
        await until(lambda: targets_of(fleet.pool) == [ONE])
        assert fleet.digest(ONE) == "asked"
        fleet.discovery._read = read
        await until(lambda: fleet.worker(ONE).load.is_registered)
    errors = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert errors == ["registry of workers not read; the last states hold"]


async def test_nobody_waits_for_a_discovery_that_has_ended(hashes: RedisHashes) -> None:
    fleet = Fleet(hashes, [ONE])
    is_reading = asyncio.Event()

    async def hang() -> WorkerStates:
        is_reading.set()
        await asyncio.sleep(3600)
        return WorkerStates()

    async with fleet.running():
        fleet.discovery._read = hang
        await is_reading.wait()
        waiting = asyncio.get_running_loop().create_task(fleet.discovery.refresh())
        await asyncio.sleep(0)
    async with asyncio.timeout(20):
        await waiting
