"""Hashes of bytes that expire, scripts and messages in a Redis or Valkey server.

Sessions, references and prompt embeddings are such hashes. Times to live are float seconds. Redis 7 or later, since
scripts carry flags.
"""

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as NotConnected
from redis.exceptions import OutOfMemoryError, RedisError

from avatar.errors import StoreUnavailable

logger = logging.getLogger(__name__)

# Lua that every script begins with: the server's time in milliseconds, since gateways' clocks may differ.
NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""
FULL_RETRY_S = 10.0
# Limit on a call, with the wait for a connection.
CALL_S = 2.0
# Connections of a client to calls that wait at a time, so that many openings at once do not need one each.
MAX_CONNECTIONS = 32


class RedisHashes:
    """Hashes, scripts and messages in a Redis server. Every method raises StoreUnavailable if it cannot be used.

    An instance belongs to the event loop that first uses it. It has at most MAX_CONNECTIONS connections, and one for
    the messages. timeout_s: limit on each call.
    """

    def __init__(self, url: str, timeout_s: float = CALL_S) -> None:
        # No socket_timeout: redis-py implements it with asyncio.wait_for, which before Python 3.12 swallows a
        # cancellation that arrives while the command is sent; a closed stream would then wait for ever. `_call` limits
        # the wait. A restarted server has closed the pooled connections: the second attempt opens a new one.
        retry = Retry(NoBackoff(), 1)
        self._redis = redis.asyncio.from_url(url, socket_timeout=None, socket_connect_timeout=timeout_s, retry=retry)
        self._timeout_s = timeout_s
        # Not redis-py's BlockingConnectionPool: if it wakes a caller that is cancelled, it wakes no other in its place.
        self._connections = asyncio.Semaphore(MAX_CONNECTIONS)
        self._scripts: dict[str, Any] = {}

    async def create(self, key: str, fields: Mapping[str, bytes], ttl_s: float) -> None:
        """Write a hash; replace one that exists."""
        async with self._call(), self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(key)
            pipe.hset(key, items=flat(fields))
            pipe.pexpire(key, to_ms(ttl_s))
            await pipe.execute()

    async def read(self, key: str, *fields: str) -> list[bytes | None]:
        """Return the values of fields, None for each that does not exist."""
        async with self._call():
            return [_bytes(value) for value in await self._redis.hmget(key, list(fields))]

    async def expires_in_s(self, key: str) -> float:
        """Return the seconds until a key expires; 0 if it does not exist."""
        async with self._call():
            return max(0, await self._redis.pttl(key)) / 1000

    async def run(
        self,
        script: str,
        keys: Sequence[str],
        args: Sequence[Any],
        *,
        flags: str = "allow-oom",
        is_logged: bool = True,
    ) -> Any:
        """Run a script, which is atomic, and return its result. All keys have one hash tag.

        script: Lua, in which `time` is the result of TIME, and `now` the same time in milliseconds since 1970.
        flags: of the script. `allow-oom`: a full store (maxmemory) runs it, too, since it frees memory or writes a few
            bytes for a session that exists. `no-writes`: it writes nothing. Empty: a full store refuses it.
        is_logged: log failures; a caller that repeats the script for ever logs them itself.
        """
        code = f"#!lua flags={flags}\n{NOW}{script}"
        if code not in self._scripts:
            self._scripts[code] = self._redis.register_script(code)
        async with self._call(is_logged=is_logged):
            return await self._scripts[code](keys=keys, args=args)

    async def messages(self, channel: str) -> AsyncGenerator[str, None]:
        """Yield the messages that scripts publish from now on, for ever."""
        pubsub = self._redis.pubsub(ignore_subscribe_messages=True)
        try:
            async with self._call():
                await pubsub.subscribe(channel)
            async for message in pubsub.listen():
                yield message["data"].decode()
        except RedisError as error:
            raise unavailable(error) from error
        finally:
            await pubsub.aclose()  # type: ignore[no-untyped-call]

    async def aclose(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    @asynccontextmanager
    async def _call(self, *, is_logged: bool = True) -> AsyncGenerator[None, None]:
        """Call Redis in the body, once there is a connection. is_logged: log failures."""
        try:
            async with limited(self._timeout_s), self._connections:
                yield
        except RedisError as error:
            raise unavailable(error, is_logged=is_logged) from error


@asynccontextmanager
async def limited(timeout_s: float) -> AsyncGenerator[None, None]:
    """Limit the time of the body, which waits for Redis. StoreUnavailable when it is over."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        message = f"the session store did not answer in {timeout_s:g} s"
        raise StoreUnavailable(message, retry_s=1.0) from error


def unavailable(error: RedisError, *, is_logged: bool = True) -> StoreUnavailable:
    """Return the error that a client gets for an error of Redis. The server's own words go to the log alone.

    Of a refusal only its first word is logged (NOAUTH, READONLY): the rest may repeat a key, and so a session's id.
    """
    if isinstance(error, OutOfMemoryError):
        logger.warning("store full")
        message = "the session store is full: nothing new can be stored until something expires or is deleted"
        return StoreUnavailable(message, retry_s=FULL_RETRY_S)
    is_refused = not isinstance(error, NotConnected)
    problem = (str(error).split() or [""])[0] if is_refused else str(error)
    if is_logged:
        logger.warning("store call failed", extra={"kind": type(error).__name__, "problem": problem})
    message = "the session store refuses the gateway" if is_refused else "the session store cannot be reached"
    return StoreUnavailable(message, retry_s=1.0)


def _bytes(value: bytes | str | None) -> bytes | None:
    assert not isinstance(value, str)  # the client does not decode
    return value


def to_ms(seconds: float) -> int:
    """Return a time to live as Redis takes it: milliseconds, rounded up so that none becomes 0."""
    return math.ceil(seconds * 1000)


def flat(fields: Mapping[str, bytes]) -> list[Any]:
    """Return names and values in turn, as HSET and our scripts take them."""
    return [part for pair in fields.items() for part in pair]
