"""Tests of avatar.store.claims: take-overs, and writes that come too late."""

import asyncio
from contextlib import aclosing

import pytest
from redis.asyncio import Redis

from avatar.errors import AvatarError, SessionBusy, SessionClosed, SessionNotFound
from avatar.store.claims import CLAIM_TTL_S, CLOSED_TTL_S, Claim, Outcome, Place
from avatar.store.sessions import SessionStore
from avatar.worker.v1 import types_pb2 as pb
from tests.store.expiry import elapse
from tests.store.test_sessions import REFERENCE, TTL_S, conditions, position, session

CLAIM = "avatar:claim:{a}"


@pytest.fixture
async def created(store: SessionStore) -> SessionStore:
    """The session store, with session `a` in it."""
    await store.references.put(REFERENCE, TTL_S)
    await store.create(session(), conditions(0), position())
    return store


PLACE = Place("10.0.0.1:7000", "east")


async def held(store: SessionStore, *, take_over: bool = False) -> Claim:
    """A claim that is acquired."""
    claim = store.claim("a", PLACE)
    await claim.acquire(take_over=take_over)
    return claim


async def restored(store: SessionStore, claim: Claim, *, may_create: bool = True) -> Outcome:
    latents = await store.references.latents("face")
    assert latents
    return await store.restore(claim, session(), latents, [conditions(1)], position(), may_create=may_create)


async def test_a_session_has_one_stream_at_a_time(created: SessionStore, redis_client: Redis) -> None:
    assert not (await created.status("a")).place
    claim = await held(created)
    await claim.acquire()
    with pytest.raises(SessionBusy, match="'a'"):
        await held(created)
    assert (await created.status("a")).place == PLACE
    await claim.release()
    assert await redis_client.keys("avatar:claim:*") == []
    await held(created)


async def test_only_a_session_that_exists_is_claimed(store: SessionStore, redis_client: Redis) -> None:
    with pytest.raises(SessionNotFound, match="'a'"):
        await held(store)
    assert await redis_client.keys() == []


async def test_a_claim_expires_unless_its_holder_renews_it(created: SessionStore, redis_client: Redis) -> None:
    claim = await held(created)
    for block in (3, 4):
        await elapse(redis_client, 0.6 * CLAIM_TTL_S)
        assert await claim.renew(position(next_block=block)) is Outcome.DONE
    assert await created.position("a") == position(next_block=4)
    await elapse(redis_client, 0.6 * CLAIM_TTL_S)
    with pytest.raises(SessionBusy):
        await held(created)
    await elapse(redis_client, 0.6 * CLAIM_TTL_S)
    assert await claim.renew() is Outcome.EXPIRED
    await held(created)


async def test_only_a_new_position_restarts_the_time_to_live(created: SessionStore, redis_client: Redis) -> None:
    claim = await held(created)
    await elapse(redis_client, 5)
    await claim.renew()
    assert (await created.status("a")).expires_in_s <= TTL_S - 5
    await claim.renew(position())
    assert (await created.status("a")).expires_in_s > TTL_S - 5


async def test_a_time_to_live_that_was_set_elsewhere_outlives_the_holders_writes(created: SessionStore) -> None:
    claim = await held(created)
    await created.set_ttl("a", 3 * TTL_S)
    await claim.renew(position(next_block=2, ttl_s=TTL_S))
    assert (await created.position("a")).ttl_s == claim.ttl_s == 3 * TTL_S
    assert (await created.status("a")).expires_in_s > 2 * TTL_S


async def test_a_take_over_moves_the_claim_and_ends_the_former_stream_when_it_commits(created: SessionStore) -> None:
    former = await held(created)
    claim = await held(created, take_over=True)
    assert claim.is_taken_over
    assert await former.renew(position(next_block=5)) is Outcome.HANDING_OVER
    assert await created.position("a") == position()
    await claim.commit(position(next_block=1))
    with pytest.raises(SessionBusy, match="'a'"):
        await former.renew(position(next_block=5))
    await former.release()
    assert await claim.renew() is Outcome.DONE
    assert await created.position("a") == position(next_block=1)


async def test_a_take_over_that_fails_gives_the_claim_back(created: SessionStore) -> None:
    former = await held(created)
    claim = await held(created, take_over=True)
    await claim.release()
    assert await former.renew(position(next_block=5)) is Outcome.DONE
    with pytest.raises(SessionBusy):
        await claim.renew()


async def test_a_claim_is_given_back_to_nobody_if_the_former_stream_is_gone(
    created: SessionStore, redis_client: Redis
) -> None:
    former = await held(created)
    await redis_client.pexpire(CLAIM, 50)
    claim = await held(created, take_over=True)
    async with asyncio.timeout(5):
        while int(await redis_client.hget(CLAIM, "previous_until") or 0) > await now_ms(redis_client):  # noqa: ASYNC110
            await asyncio.sleep(0.01)  # the server's clock
    await claim.release()
    assert not (await created.status("a")).place
    assert await former.renew() is Outcome.EXPIRED


async def now_ms(client: Redis) -> int:
    seconds, microseconds = await client.time()
    return int(seconds * 1000 + microseconds // 1000)


async def test_the_former_stream_lives_on_while_it_renews_during_a_take_over(
    created: SessionStore, redis_client: Redis
) -> None:
    former = await held(created)
    await redis_client.pexpire(CLAIM, 1000)
    claim = await held(created, take_over=True)
    await former.renew()
    await claim.release()
    assert await redis_client.pttl(CLAIM) > 1000


async def test_the_later_of_two_take_overs_has_the_claim_and_gives_it_back_to_the_first_stream(
    created: SessionStore,
) -> None:
    former, earlier = await held(created), await held(created, take_over=True)
    later = await held(created, take_over=True)
    for call in (earlier.renew(), earlier.commit()):
        with pytest.raises(SessionBusy):
            await call
    await earlier.release()
    assert await former.renew() is Outcome.HANDING_OVER
    await later.release()
    assert await former.renew() is Outcome.DONE


async def test_a_stream_that_ends_during_a_take_over_does_not_get_the_claim_back(created: SessionStore) -> None:
    former, claim = await held(created), await held(created, take_over=True)
    with pytest.raises(SessionBusy):
        await former.close(position())
    await former.release()
    await claim.release()
    assert not (await created.status("a")).place


@pytest.mark.parametrize("change", ["take over", "commit", "give back", "delete"])
async def test_a_change_is_published(created: SessionStore, change: str) -> None:
    await held(created)
    claim = await held(created, take_over=True) if change != "take over" else created.claim("a")
    async with aclosing(created.changes()) as changes, asyncio.timeout(5):
        seen = asyncio.ensure_future(anext(changes))
        await until_subscribed(created)
        match change:
            case "take over":
                await claim.acquire(take_over=True)
            case "commit":
                await claim.commit()
            case "give back":
                await claim.release()
            case "delete":
                await created.delete("a")
        assert await seen == "a"


async def until_subscribed(store: SessionStore) -> None:
    redis = store._hashes._redis
    while not (await redis.pubsub_numsub("avatar:changes"))[0][1]:  # noqa: ASYNC110
        await asyncio.sleep(0.005)  # the subscription is made by another task


async def test_a_closed_session_stays_closed_for_its_minute_and_is_gone_then(
    created: SessionStore, redis_client: Redis
) -> None:
    await created.set_ttl("a", 3600.0)
    stale, claim = await held(created), await held(created, take_over=True)
    await claim.commit()
    closing = position(next_block=9)
    await created.close(claim, session(), closing)
    await claim.release()
    assert (await created.position("a")).is_closed
    assert (await created.status("a")).expires_in_s <= CLOSED_TTL_S
    writes = [
        created.put_conditions("a", conditions(1)),
        created.put_prompt(session(), conditions(1)),
        created.set_ttl("a", TTL_S),
        restored(created, stale),
        stale.close(position()),
    ]
    for write in writes:
        with pytest.raises(SessionClosed, match="'a'"):
            await write
    assert await created.position("a") == pb.Position(
        next_block=9, next_frame=closing.next_frame, is_closed=True, ttl_s=3600.0
    )
    await elapse(redis_client, CLOSED_TTL_S)
    with pytest.raises(SessionNotFound):
        await created.session("a")


async def test_closing_leaves_a_small_record(created: SessionStore, redis_client: Redis) -> None:
    claim = await held(created)
    await claim.close(position())
    assert set(await redis_client.hkeys("avatar:session:{a}")) == {b"session", b"position", b"ttl", b"closed"}
    await claim.close(position(next_block=2))
    assert (await created.position("a")).next_block == 2


async def test_versions_of_the_conditions_that_no_block_needs_are_deleted(
    created: SessionStore, redis_client: Redis
) -> None:
    claim = await held(created)
    for version in range(1, 5):
        await created.put_conditions("a", conditions(version))
    await claim.renew(position(), [1, 3])
    fields = set(await redis_client.hkeys("avatar:session:{a}")) - {b"session", b"position", b"ttl"}
    assert fields == {b"conditions/1", b"conditions/3", b"conditions/4"}, "the last level may have written the fourth"


async def test_renewing_a_claim_tells_a_deleted_session_from_an_emptied_store(
    created: SessionStore, redis_client: Redis
) -> None:
    claim = await held(created)
    latents = await created.references.latents("face")
    assert latents
    await redis_client.flushdb()
    assert await claim.renew(position()) is Outcome.EXPIRED
    assert await created.restore(claim, session(), latents, [conditions(1)], position(next_block=2)) is Outcome.DONE
    assert await created.session("a") == session()
    assert await created.conditions("a", 1) == conditions(1)
    assert await created.position("a") == position(next_block=2)
    await created.delete("a")
    with pytest.raises(SessionNotFound, match="'a'"):
        await claim.renew(position())
    assert claim.ttl_s == 0


async def test_nothing_recreates_a_deleted_session(created: SessionStore, redis_client: Redis) -> None:
    claim = await held(created)
    await created.delete("a")
    await elapse(redis_client, CLAIM_TTL_S)
    assert await claim.renew(position()) is Outcome.EXPIRED
    with pytest.raises(SessionNotFound):
        await restored(created, claim)
    for write in (created.put_conditions("a", conditions(1)), created.set_ttl("a", TTL_S)):
        with pytest.raises(SessionNotFound):
            await write
    assert await redis_client.keys("avatar:session:*") == []


async def test_a_stream_that_was_stopped_recreates_nothing(created: SessionStore, redis_client: Redis) -> None:
    claim = await held(created)
    await redis_client.delete("avatar:session:{a}", CLAIM)
    with pytest.raises(SessionNotFound):
        await restored(created, claim, may_create=False)
    assert await redis_client.keys("avatar:session:*") == []


async def test_restoring_respects_another_stream(created: SessionStore) -> None:
    former = await held(created)
    claim = await held(created, take_over=True)
    assert await restored(created, former) is Outcome.HANDING_OVER
    await claim.commit()
    with pytest.raises(SessionBusy):
        await restored(created, former)


async def test_random_writers_never_bring_a_closed_session_back(created: SessionStore) -> None:
    """Streams that take over, write, restore and close at once: after the close nothing changes but its minute."""
    closed = asyncio.Event()

    async def write(claim: Claim, number: int) -> None:
        for block in range(20):
            try:
                await claim.renew(position(next_block=100 * number + block))
                await restored(created, claim)
            except AvatarError:
                pass
            if number == 2 and block == 10:
                await claim.acquire(take_over=True)
                await claim.commit()
                await claim.close(position(next_block=7))
                closed.set()

    claims = [created.claim("a") for _ in range(3)]
    for claim in claims:
        await claim.acquire(take_over=True)
    await asyncio.gather(*(write(claim, number) for number, claim in enumerate(claims)))
    assert closed.is_set()
    assert (await created.position("a")).is_closed
