"""Tests of avatar.store.redis beside those of tests/store/test_sessions.py, which hold both kinds to the same facts."""

import asyncio
import socket
import time

import pytest

from avatar.errors import StoreUnavailable
from avatar.store.redis import MemoryHashes, RedisHashes
from avatar.store.sessions import SessionStore
from tests.store.test_sessions import conditions, position, session


def test_memory_forgets_what_has_expired_when_it_is_given_more() -> None:
    now = 0.0
    hashes = MemoryHashes(clock=lambda: now)

    async def fill() -> None:
        nonlocal now
        for index in range(100):
            now = float(index)
            await hashes.create(str(index), {"field": bytes(8)}, ttl_s=1.5)

    asyncio.run(fill())
    assert len(hashes._hashes) == 2


@pytest.mark.parametrize("is_silent", [False, True], ids=["nobody listens", "nobody answers"])
async def test_a_store_that_cannot_be_reached_says_so_in_bounded_time(is_silent: bool) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if is_silent:
            server.listen()
        hashes = RedisHashes(f"redis://127.0.0.1:{server.getsockname()[1]}", timeout_s=0.2)
        store = SessionStore(hashes)
        calls = (
            lambda: store.session("a"),
            lambda: store.create(session("a"), conditions(0), position()),
            lambda: store.renew("a", position()),
            lambda: store.delete("a"),
            lambda: store.expires_in_s("a"),
            lambda: store.claim("a", "owner"),
            lambda: store.keep("a", "owner", position()),
            lambda: store.release("a", "owner"),
        )
        for call in calls:
            started = time.monotonic()
            with pytest.raises(StoreUnavailable) as caught:
                await call()
            assert time.monotonic() - started < 2
            assert caught.value.retry_s
        await store.aclose()
