"""Tests of avatar.store.usage: leases and counters that several gateways share."""

import asyncio
from collections.abc import AsyncGenerator

import pytest
from redis.asyncio import Redis

from avatar.errors import StoreUnavailable
from avatar.store.redis import RedisHashes
from avatar.store.usage import Lease, TenantUsage
from tests.store.expiry import elapse

SHORT_S, LONG_S = 10.0, 60.0


@pytest.fixture
async def usages(redis: str) -> AsyncGenerator[tuple[TenantUsage, TenantUsage], None]:
    """Two gateways' usage over one empty server."""
    hashes = RedisHashes(redis), RedisHashes(redis)
    yield TenantUsage(hashes[0]), TenantUsage(hashes[1])
    for each in hashes:
        await each.aclose()


@pytest.fixture
def usage(usages: tuple[TenantUsage, TenantUsage]) -> TenantUsage:
    return usages[0]


async def test_a_set_leases_no_more_names_than_its_limit(usages: tuple[TenantUsage, TenantUsage]) -> None:
    usage, other = usages
    assert await usage.lease("set", "a", LONG_S, 2)
    assert await other.lease("set", "b", LONG_S, 2)
    assert not await usage.lease("set", "c", LONG_S, 2)
    assert await usage.lease("another set", "c", LONG_S, 2)
    assert not await usage.lease("an empty set", "c", LONG_S, 0)


async def test_renewing_a_lease_does_not_count_twice(usages: tuple[TenantUsage, TenantUsage]) -> None:
    usage, other = usages
    assert await usage.lease("set", "a", LONG_S, 1)
    assert await other.lease("set", "a", LONG_S, 1)
    assert not await usage.lease("set", "b", LONG_S, 1)


async def test_a_released_lease_is_free_at_once(usage: TenantUsage) -> None:
    assert await usage.lease("set", "a", LONG_S, 1)
    await usage.release("set", "unknown")
    assert not await usage.lease("set", "b", LONG_S, 1)
    await usage.release("set", "a")
    assert await usage.lease("set", "b", LONG_S, 1)


async def test_a_lease_expires_unless_it_is_renewed(usage: TenantUsage, redis_client: Redis) -> None:
    assert await usage.lease("set", "expires", SHORT_S, 2)
    assert await usage.lease("set", "is renewed", SHORT_S, 2)
    assert await usage.lease("set", "is renewed", LONG_S, 2)
    await elapse(redis_client, SHORT_S)
    assert await usage.lease("set", "next", LONG_S, 2)
    assert not await usage.lease("set", "another", LONG_S, 2)


async def test_a_renewal_can_shorten_a_lease(usage: TenantUsage, redis_client: Redis) -> None:
    assert await usage.lease("set", "a", LONG_S, 1)
    assert await usage.lease("set", "a", SHORT_S, 1)
    await elapse(redis_client, SHORT_S)
    assert await usage.lease("set", "b", LONG_S, 1)


async def test_a_lease_that_exists_is_left_as_it_is_where_it_is_not_to_be_renewed(
    usage: TenantUsage, redis_client: Redis
) -> None:
    assert await usage.lease("set", "a", SHORT_S, 1, renews=False) is Lease.NEW
    assert await usage.lease("set", "a", LONG_S, 1, renews=False) is Lease.EXISTED
    await elapse(redis_client, SHORT_S)
    assert await usage.lease("set", "b", LONG_S, 1) is Lease.NEW


async def test_names_are_listed_by_the_end_of_their_leases(usage: TenantUsage) -> None:
    await usage.lease("set", "late", LONG_S)
    await usage.lease("set", "soon", SHORT_S)
    assert await usage.names("set") == ["soon", "late"]
    assert await usage.names("another set") == []


async def test_a_lease_without_a_limit_is_always_granted_and_counts(usage: TenantUsage) -> None:
    assert await usage.lease("set", "a", LONG_S, 1)
    assert await usage.lease("set", "unlimited", LONG_S)
    assert not await usage.lease("set", "b", LONG_S, 2)


async def test_concurrent_leases_stay_within_the_limit(usage: TenantUsage) -> None:
    leases = await asyncio.gather(*(usage.lease("set", str(i), LONG_S, 5) for i in range(20)))
    assert leases.count(Lease.NEW) == 5
    assert leases.count(Lease.REFUSED) == 15


async def test_a_counter_sums_over_all_gateways(usages: tuple[TenantUsage, TenantUsage]) -> None:
    usage, other = usages
    assert await usage.add("counter", 0.0, LONG_S) == 0.0
    assert await usage.add("counter", 1.25, LONG_S) == 1.25
    assert await other.add("counter", 0.5, LONG_S) == 1.75
    assert await usage.add("another counter", 1.0, LONG_S) == 1.0


async def test_a_limited_counter_gives_what_is_left_and_passes_its_limit_by_less_than_the_least(
    usages: tuple[TenantUsage, TenantUsage],
) -> None:
    usage, other = usages
    assert await usage.take("counter", 4.0, 0.0, 10.0, LONG_S) == 4.0
    assert await other.take("counter", 4.0, 3.0, 10.0, LONG_S) == 4.0
    assert await usage.take("counter", 4.0, 1.0, 10.0, LONG_S) == 2.0
    assert await usage.take("counter", 4.0, 1.0, 10.0, LONG_S) == 0.0
    assert await usage.add("counter", -0.5, LONG_S) == 9.5
    assert await other.take("counter", 4.0, 3.0, 10.0, LONG_S) == 3.0
    assert await usage.take("counter", 0.1, 0.1, 10.0, LONG_S) == 0.0
    assert await usage.add("counter", 0.0, LONG_S) == 12.5


async def test_a_counter_expires(usage: TenantUsage, redis_client: Redis) -> None:
    await usage.add("counter", 3.0, SHORT_S)
    await elapse(redis_client, SHORT_S)
    assert await usage.add("counter", 1.0, LONG_S) == 1.0


async def test_a_set_expires_with_its_last_lease(usage: TenantUsage, redis_client: Redis) -> None:
    await usage.lease("set", "a", SHORT_S, 1)
    await usage.lease("set", "b", LONG_S)
    [key] = await redis_client.keys()
    assert 0.9 * LONG_S * 1000 < await redis_client.pttl(key) <= LONG_S * 1000


async def test_an_unreachable_server_is_reported() -> None:
    hashes = RedisHashes("redis://127.0.0.1:1", timeout_s=0.2)
    usage = TenantUsage(hashes)
    for call in (usage.lease("a", "b", 1.0, 1), usage.release("a", "b"), usage.add("a", 1.0, 1.0)):
        with pytest.raises(StoreUnavailable):
            await call
    await hashes.aclose()
