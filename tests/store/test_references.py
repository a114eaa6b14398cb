"""Tests of avatar.store.references: latents that sessions of one picture share."""

import asyncio
import gc

import pytest
from redis.asyncio import Redis

from avatar.errors import ReferenceNotFound, StoreUnavailable
from avatar.store.redis import RedisHashes
from avatar.store.references import LEASE_MARGIN_S, Latents, References, SharedLatents
from avatar.store.sessions import SessionStore
from avatar.worker.v1 import types_pb2 as pb
from tests.store.expiry import elapse
from tests.store.test_sessions import REFERENCE, TTL_S, conditions, position, session

LATENTS = "avatar:latents:{face}"
MOTION = REFERENCE.motion.SerializeToString()


@pytest.fixture
async def created(store: SessionStore) -> SessionStore:
    """The session store, with a reference and sessions `a` and `b` of it."""
    await store.references.put(REFERENCE, TTL_S)
    for name in ("a", "b"):
        await store.create(session(name), conditions(0), position())
    return store


async def test_a_reference_is_read_as_it_was_written_until_it_expires(store: SessionStore, redis_client: Redis) -> None:
    await store.references.put(REFERENCE, 30.0)
    constants = pb.Reference(id="face", width=64, height=48, fit="cover")
    assert await store.references.get("face") == constants
    latents = await store.references.latents("face")
    assert latents
    assert (latents.motion, latents.sink) == (MOTION, REFERENCE.sink)
    assert 29 < await store.references.expires_in_s("face") <= 30
    await elapse(redis_client, 30)
    assert await store.references.expires_in_s("face") == 0
    with pytest.raises(ReferenceNotFound, match="no reference 'face'"):
        await store.references.get("face")
    assert await redis_client.keys() == []


@pytest.mark.usefixtures("created")
async def test_sessions_of_a_picture_share_one_copy_of_its_latents(redis_client: Redis) -> None:
    motion = REFERENCE.motion.data
    sizes = {key: sum(map(len, await redis_client.hvals(key))) for key in await redis_client.keys("avatar:session:*")}
    assert len(sizes) == 2
    assert max(sizes.values()) < len(motion)
    assert sum(map(len, await redis_client.hvals(LATENTS))) > len(motion)


async def test_latents_live_until_the_last_session_lets_go(created: SessionStore, redis_client: Redis) -> None:
    await created.references.delete("face")
    with pytest.raises(ReferenceNotFound):
        await created.references.get("face")
    with pytest.raises(ReferenceNotFound):
        await created.references.delete("face")
    await created.delete("a")
    assert await created.references.latents("face")
    claim = created.claim("b")
    await claim.acquire()
    await created.close(claim, session("b"), position())
    assert not await redis_client.exists(LATENTS)


async def test_latents_live_as_long_as_the_longest_lease(created: SessionStore, redis_client: Redis) -> None:
    await created.set_ttl("b", 3 * TTL_S)
    await elapse(redis_client, 2 * TTL_S)
    assert await created.references.latents("face")
    await elapse(redis_client, TTL_S + LEASE_MARGIN_S)
    assert await redis_client.keys() == []


async def test_latents_that_the_store_has_lost_are_written_again(created: SessionStore, redis_client: Redis) -> None:
    latents = await created.references.latents("face")
    assert latents
    await redis_client.flushdb()
    assert not await created.references.lease("face", "a", TTL_S)
    for name in ("a", "b"):
        await created.references.restore("face", latents, name, TTL_S)
    await created.references.release("face", "a")
    assert await created.references.latents("face") == latents
    await created.references.release("face", "b")
    assert await redis_client.keys() == []


async def test_a_closed_session_takes_no_latents_back(created: SessionStore, redis_client: Redis) -> None:
    await created.references.delete("face")
    for name in ("a", "b"):
        claim = created.claim(name)
        await claim.acquire()
        await created.close(claim, session(name), position())
    assert not await redis_client.exists(LATENTS)


class CountingReferences(References):
    """References that count how often their latents are read, and fail to read them while `is_away`."""

    num_reads, is_away = 0, False

    async def latents(self, reference_id: str) -> Latents | None:
        self.num_reads += 1
        await asyncio.sleep(0)
        if self.is_away:
            raise StoreUnavailable("the session store cannot be reached")
        return await super().latents(reference_id)


@pytest.mark.usefixtures("created")
async def test_latents_are_read_once_and_shared_as_long_as_they_are_used(hashes: RedisHashes) -> None:
    references = CountingReferences(hashes)
    shared = SharedLatents(references)
    copies = await asyncio.gather(*(shared.get("face") for _ in range(9)))
    assert len({id(each) for each in copies}) == references.num_reads == 1
    del copies
    await asyncio.sleep(0)  # the event loop's own reference to them ends
    gc.collect()
    assert await shared.get("face")
    assert references.num_reads == 2
    assert await shared.get("nobody") is None


@pytest.mark.usefixtures("created")
async def test_a_read_that_fails_or_is_cancelled_is_repeated_for_those_who_wait(hashes: RedisHashes) -> None:
    references = CountingReferences(hashes)
    shared = SharedLatents(references)
    first, second = (asyncio.ensure_future(shared.get("face")) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert await second
    references.is_away = True
    with pytest.raises(StoreUnavailable):
        await SharedLatents(references).get("face")
    references.is_away = False
    assert await shared.get("face")
