"""Tests of avatar.store.registry: states of workers that are written, read together and forgotten."""

from redis.asyncio import Redis

from avatar.store import registry as registry_module
from avatar.store.redis import RedisHashes
from avatar.store.registry import WorkerRegistry
from avatar.worker.v1.discovery_pb2 import WorkerState


def state(address: str, active: int = 0) -> WorkerState:
    worker = WorkerState(address=address)
    worker.audio.active = active
    return worker


async def active(registry: WorkerRegistry) -> dict[str, int]:
    """Return the active streams of all workers by address."""
    return {each.address: each.audio.active for each in (await registry.read()).workers}


async def test_one_read_gives_the_last_state_of_every_worker_of_a_cell(hashes: RedisHashes) -> None:
    one, other = WorkerRegistry(hashes, "one"), WorkerRegistry(hashes, "other")
    assert await active(one) == {}
    await one.write(*(state(f"w{number}:1", number) for number in range(3)))
    await one.write(state("w1:1", 5))
    await other.write(state("w1:1", 9))
    assert await active(one) == {"w0:1": 0, "w1:1": 5, "w2:1": 2}
    await one.remove("w2:1")
    assert await active(one) == {"w0:1": 0, "w1:1": 5}
    assert await active(other) == {"w1:1": 9}


async def test_a_drain_outlives_the_stores_data_until_it_is_ended(hashes: RedisHashes, redis_client: Redis) -> None:
    registry = WorkerRegistry(hashes, "main")
    assert not await registry.is_drained()
    await registry.set_drained(is_drained=True)
    assert await registry.is_drained()
    await redis_client.flushdb()
    assert not await registry.is_drained()
    assert await registry.is_drained(was_drained=True)
    assert await registry.is_drained()
    # Gateways that have not read the end of the drain do not undo it.
    await registry.set_drained(is_drained=False)
    assert not await registry.is_drained(was_drained=True)
    assert not await registry.is_drained()


async def test_a_state_that_is_not_written_again_is_forgotten(hashes: RedisHashes, redis_client: Redis) -> None:
    registry = WorkerRegistry(hashes, "main")
    await registry.write(state("old:1"))
    await redis_client.zincrby("avatar:workers-seen:{main}", -1000 * registry_module.STALE_S, "old:1")
    await registry.write(state("new:1"))
    assert await active(registry) == {"new:1": 0}
    assert await redis_client.hkeys("avatar:workers:{main}") == [b"new:1"]
    assert await redis_client.zrange("avatar:workers-seen:{main}", 0, -1) == [b"new:1"]
    for name in ("workers", "workers-seen"):
        assert 0 < await redis_client.pttl(f"avatar:{name}:{{main}}") <= 1000 * registry_module.CELL_TTL_S
