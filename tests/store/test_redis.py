"""Tests of avatar.store.redis: a server that is unreachable, full, or refuses the gateway."""

import asyncio
import socket
import time

import pytest
from redis.asyncio import Redis

from avatar.errors import StoreUnavailable
from avatar.store.redis import MAX_CONNECTIONS, RedisHashes
from avatar.store.sessions import SessionStore
from avatar.worker.v1 import types_pb2 as pb
from avatar.worker.v1.text_pb2 import EmbedResponse
from tests.store.test_sessions import REFERENCE, conditions, position, session


@pytest.mark.parametrize("is_listening", [False, True], ids=["no server", "a server that does not answer"])
async def test_an_unreachable_server_is_reported_in_bounded_time(is_listening: bool) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if is_listening:
            server.listen()
        store = SessionStore(RedisHashes(f"redis://127.0.0.1:{server.getsockname()[1]}", timeout_s=0.1))
        calls = (
            lambda: store.session("a"),
            lambda: store.create(session("a"), conditions(0), position()),
            lambda: store.delete("a"),
            lambda: store.claim("a").acquire(),
            lambda: store.claim("a").renew(position()),
            lambda: store.claim("a").release(),
            lambda: anext(store.changes()),
        )
        for call in calls:
            started = time.monotonic()
            with pytest.raises(StoreUnavailable) as caught:
                await call()
            assert time.monotonic() - started < 2
            assert caught.value.retry_s
        await store.aclose()


async def test_a_connection_that_the_server_closed_is_opened_again(hashes: RedisHashes, redis_client: Redis) -> None:
    number = await hashes._redis.client_id()
    await redis_client.client_kill_filter(_id=str(number))
    assert await hashes.read("nothing", "field") == [None]


async def test_many_calls_at_once_share_few_connections(hashes: RedisHashes, redis_client: Redis) -> None:
    before = (await redis_client.info("stats"))["total_connections_received"]
    assert await asyncio.gather(*(hashes.read("nothing", "field") for _ in range(1000))) == [[None]] * 1000
    opened = (await redis_client.info("stats"))["total_connections_received"] - before
    assert opened <= MAX_CONNECTIONS


async def test_the_wait_for_a_connection_counts_against_the_limit_of_a_call(redis: str, redis_client: Redis) -> None:
    hashes = RedisHashes(redis, timeout_s=0.2)
    await redis_client.client_pause(10_000, all=False)  # writes alone
    try:
        calls = [hashes.create("a", {"field": b"value"}, 60.0) for _ in range(3 * MAX_CONNECTIONS)]
        async with asyncio.timeout(5):
            errors = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(error) for error in errors} == {StoreUnavailable}
    finally:
        await redis_client.client_unpause()
    await hashes.create("a", {"field": b"value"}, 60.0)
    await hashes.aclose()


async def test_an_error_says_nothing_of_the_servers_words(
    hashes: RedisHashes, redis_client: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    session_id = "a" * 32
    await redis_client.set(f"avatar:session:{{{session_id}}}", "of another kind")
    with pytest.raises(StoreUnavailable) as caught:
        await SessionStore(hashes).session(session_id)
    assert caught.value.message == "the session store refuses the gateway"
    with pytest.raises(StoreUnavailable) as caught:
        await hashes.run(f"return redis.call('NOCOMMAND', '{session_id}')", [], [])
    assert caught.value.message == "the session store refuses the gateway"
    assert len(caplog.records) == 2
    assert all(session_id not in str(vars(record)) for record in caplog.records)


async def test_a_full_store_keeps_streams_and_refuses_what_is_new(store: SessionStore, redis_client: Redis) -> None:
    await store.references.put(REFERENCE, 60.0)
    await store.create(session("a"), conditions(0), position())
    claim = store.claim("a")
    await claim.acquire()
    await redis_client.config_set("maxmemory", 1)
    await redis_client.config_set("maxmemory-policy", "noeviction")
    try:
        for refused in (
            store.references.put(pb.Reference(id="b"), 60.0),
            store.create(session("b"), conditions(0), position()),
            store.put_embedding("prompt", EmbedResponse(), 60.0),
        ):
            with pytest.raises(StoreUnavailable, match="the session store is full") as caught:
                await refused
            assert caught.value.retry_s
        assert b"b" not in await redis_client.zrange("avatar:leases:{face}", 0, -1)
        await claim.renew(position(next_block=1))
        await store.put_conditions("a", conditions(1))
        await store.usage.lease("acme/sessions", "a", 60.0)
        await store.usage.take("acme/audio/1", 1.0, 0.0, 10.0, 60.0)
        assert await store.references.latents("face")
        other = store.claim("a")
        await other.acquire(take_over=True)
        await other.commit(position(next_block=2))
        await store.close(other, session("a"), position(next_block=3))
        await store.delete("a")
    finally:
        await redis_client.config_set("maxmemory", 0)
    await store.create(session("b"), conditions(0), position())
