"""Tests of avatar.store.registry: states of workers that are written, read together and forgotten."""

import pytest
from redis.asyncio import Redis

from avatar.store import registry as registry_module
from avatar.store.redis import RedisHashes
from avatar.store.registry import WorkerRegistry
from avatar.worker.v1.discovery_pb2 import WorkerState, WorkerStates


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
    await one.remove("audio", "w2:1")
    assert await active(one) == {"w0:1": 0, "w1:1": 5}
    assert await active(other) == {"w1:1": 9}


async def test_a_process_that_serves_several_stages_is_a_worker_of_each(hashes: RedisHashes) -> None:
    registry, decoder = WorkerRegistry(hashes, "main"), WorkerState(address="here:1")
    decoder.vae.active = 1
    await registry.write(state("here:1", 2), decoder)
    assert {each.WhichOneof("info") for each in (await registry.read()).workers} == {"audio", "vae"}
    await registry.remove("audio", "here:1")
    assert [each.vae.active for each in (await registry.read()).workers] == [1]


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
    await redis_client.zincrby("avatar:workers-seen:{main}", -1000 * registry_module.STALE_S, "audio/old:1")
    await registry.write(state("new:1"))
    assert await active(registry) == {"new:1": 0}
    assert await redis_client.hkeys("avatar:workers:{main}") == [b"audio/new:1"]
    assert await redis_client.zrange("avatar:workers-seen:{main}", 0, -1) == [b"audio/new:1"]
    for name in ("workers", "workers-seen"):
        assert 0 < await redis_client.pttl(f"avatar:{name}:{{main}}") <= 1000 * registry_module.CELL_TTL_S


SERIALIZED = WorkerStates(workers=[state("w0:1", 3)]).SerializeToString()
BAD_ENTRIES = {
    "no message": b"\xff\xff\xff",
    "an address that is not UTF-8": b"\x0a\x05\x0a\x03\xff\xfe\xfd",
    "text": b"hello",
    "nothing": b"",
    "no worker": b"\x10\x01",
    "two workers": SERIALIZED * 2,
    **{f"a state without its last {cut} bytes": SERIALIZED[:-cut] for cut in range(1, len(SERIALIZED))},
}


@pytest.mark.parametrize("value", BAD_ENTRIES.values(), ids=BAD_ENTRIES)
async def test_an_entry_that_is_no_state_is_skipped_and_named_once(
    hashes: RedisHashes, redis_client: Redis, caplog: pytest.LogCaptureFixture, value: bytes
) -> None:
    caplog.set_level("INFO")
    registry = WorkerRegistry(hashes, "main")
    await redis_client.hset("avatar:workers:{main}", "jun\udcffk".encode(errors="surrogateescape"), value)
    await redis_client.zadd("avatar:workers-seen:{main}", {b"jun\xffk": "+inf"})
    await registry.write(*(state(f"w{number}:1", number) for number in range(3)))
    for _ in range(2):
        assert await active(registry) == {"w0:1": 0, "w1:1": 1, "w2:1": 2}
    await redis_client.hdel("avatar:workers:{main}", "jun\udcffk".encode(errors="surrogateescape"))
    await redis_client.zrem("avatar:workers-seen:{main}", b"jun\xffk")
    assert len(await active(registry)) == 3
    assert [(each.getMessage(), vars(each).get("entries")) for each in caplog.records] == [
        ("registry entries skipped that are no worker's state", ["jun\\xffk"]),
        ("no registry entries skipped any more", None),
    ]


async def test_an_entry_without_a_time_is_deleted(hashes: RedisHashes, redis_client: Redis) -> None:
    registry = WorkerRegistry(hashes, "main")
    await registry.write(state("here:1"))
    await redis_client.hset("avatar:workers:{main}", mapping={"junk": b"\xff\xff\xff", "audio/old:1": SERIALIZED})
    assert await active(registry) == {"here:1": 0}
    assert await redis_client.hkeys("avatar:workers:{main}") == [b"audio/here:1"]
