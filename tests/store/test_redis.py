"""Tests of avatar.store.redis: a server that is unreachable, full, or refuses the gateway."""

import socket
import time

import pytest
from redis.asyncio import Redis

from avatar.errors import StoreUnavailable
from avatar.store.redis import RedisHashes
from avatar.store.sessions import SessionStore
from tests.store.test_sessions import conditions, position, session


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
            lambda: store.expires_in_s("a"),
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
