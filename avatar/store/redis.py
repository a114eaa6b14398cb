"""Hashes of bytes that expire, and locks on them, in a Redis or Valkey server.

Sessions, references and prompt embeddings are such hashes. Times to live are float seconds.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from avatar.errors import StoreUnavailable


@dataclass(frozen=True)
class Lock:
    """A lock: key, owner, time to live. It expires unless its owner renews it."""

    key: str
    owner: str
    ttl_s: float


class Renewal(IntEnum):
    """The outcome of renewing a lock and updating a hash; the numbers are those that the script returns."""

    RENEWED = 0
    LOCK_EXPIRED = 1
    LOCK_TAKEN = 2
    HASH_GONE = 3


# Scripts run atomically on the server. ARGV of the two that write fields ends with the hash's time to live in
# milliseconds (0 leaves it as it is), then names and values in turn.

# Update a hash: return 0 if it does not exist, since HSET would create a new one without a time to live.
_UPDATE = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
for i = 2, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
if tonumber(ARGV[1]) > 0 then redis.call('PEXPIRE', KEYS[1], ARGV[1]) end
return 1
"""
# Acquire a lock for the owner ARGV[1] for ARGV[2] milliseconds: return 0 if another owner has it, unless ARGV[3] is 1.
_ACQUIRE = """
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] and ARGV[3] == '0' then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
# Renew the lock KEYS[1], then update the hash KEYS[2] as _UPDATE does: return a Renewal. Nothing is written unless the
# owner ARGV[1] still has the lock.
_RENEW = """
local owner = redis.call('GET', KEYS[1])
if not owner then return 1 end
if owner ~= ARGV[1] then return 2 end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
if redis.call('EXISTS', KEYS[2]) == 0 then return 3 end
for i = 4, #ARGV, 2 do redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1]) end
if tonumber(ARGV[3]) > 0 then redis.call('PEXPIRE', KEYS[2], ARGV[3]) end
return 0
"""
# Release a lock if the owner ARGV[1] has it; another owner's lock stays.
_RELEASE = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
"""


class RedisHashes:
    """Hashes and locks in a Redis or Valkey server. Every method raises StoreUnavailable if it cannot be reached.

    An instance belongs to the event loop that first uses it. timeout_s: limit on each call.
    """

    def __init__(self, url: str, timeout_s: float = 2.0) -> None:
        self._redis = open_redis(url, timeout_s)
        self._timeout_s = timeout_s
        self._update = self._redis.register_script(_UPDATE)
        self._acquire = self._redis.register_script(_ACQUIRE)
        self._renew = self._redis.register_script(_RENEW)
        self._release = self._redis.register_script(_RELEASE)

    async def create(self, key: str, fields: Mapping[str, bytes], ttl_s: float) -> None:
        """Write a hash; replace one that exists."""
        async with self._call(), self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(key)
            pipe.hset(key, items=_flat(fields))
            pipe.pexpire(key, to_ms(ttl_s))
            await pipe.execute()

    async def update(self, key: str, fields: Mapping[str, bytes], ttl_s: float | None) -> bool:
        """Write fields of a hash, and renew it if ttl_s is given; False if the hash does not exist."""
        async with self._call():
            return bool(await self._update(keys=[key], args=_field_args(fields, ttl_s)))

    async def read(self, key: str, field: str) -> bytes | None:
        """Return a field's value, None if the hash or the field does not exist."""
        async with self._call():
            value = await self._redis.hget(key, field)
            assert value is None or isinstance(value, bytes)
            return value

    async def expires_in_s(self, key: str) -> float:
        """Return the seconds until a hash or a lock expires; 0 if it does not exist."""
        async with self._call():
            return max(0, await self._redis.pttl(key)) / 1000

    async def delete(self, key: str) -> bool:
        """Delete a hash; False if it does not exist."""
        async with self._call():
            return bool(await self._redis.delete(key))

    async def acquire(self, lock: Lock, *, take_over: bool = False) -> bool:
        """Acquire a lock, or renew it if its owner has it; False if another owner does, unless take_over is set."""
        async with self._call():
            return bool(await self._acquire(keys=[lock.key], args=[lock.owner, to_ms(lock.ttl_s), int(take_over)]))

    async def renew(self, lock: Lock, key: str, fields: Mapping[str, bytes], ttl_s: float | None) -> Renewal:
        """Renew a lock and `update` a hash, in one step. Nothing is written unless the lock's owner still has it."""
        args = [lock.owner, to_ms(lock.ttl_s), *_field_args(fields, ttl_s)]
        async with self._call():
            return Renewal(await self._renew(keys=[lock.key, key], args=args))

    async def release(self, lock: Lock) -> None:
        """Release a lock; nothing happens if its owner no longer has it."""
        async with self._call():
            await self._release(keys=[lock.key], args=[lock.owner])

    async def aclose(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    def _call(self) -> AbstractAsyncContextManager[None]:
        return redis_call(self._timeout_s)


def open_redis(url: str, timeout_s: float) -> redis.asyncio.Redis:
    """Return a client of a Redis or Valkey server. It belongs to the event loop that first uses it.

    timeout_s: limit on connecting; `redis_call` limits everything else.
    """
    # No socket_timeout: redis-py implements it with asyncio.wait_for, which before Python 3.12 swallows a cancellation
    # that arrives while the command is sent; a closed stream would then wait for ever. `redis_call` limits the wait.
    # A restarted server has closed the pooled connections: the second attempt opens a new one.
    retry = Retry(NoBackoff(), 1)
    return redis.asyncio.from_url(url, socket_timeout=None, socket_connect_timeout=timeout_s, retry=retry)


@asynccontextmanager
async def redis_call(timeout_s: float) -> AsyncGenerator[None, None]:
    """Limit the time of the Redis calls in the body. StoreUnavailable if the server cannot be reached."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        message = f"the session store did not answer in {timeout_s:g} s"
        raise StoreUnavailable(message, retry_s=1.0) from error
    except RedisError as error:
        raise StoreUnavailable(f"the session store cannot be reached: {error}", retry_s=1.0) from error


def to_ms(seconds: float) -> int:
    """Return a time to live as Redis takes it: milliseconds, rounded up so that none becomes 0."""
    return math.ceil(seconds * 1000)


def _field_args(fields: Mapping[str, bytes], ttl_s: float | None) -> list[Any]:
    """Return the scripts' arguments for a hash: milliseconds to live or 0, then names and values in turn."""
    return [0 if ttl_s is None else to_ms(ttl_s), *_flat(fields)]


def _flat(fields: Mapping[str, bytes]) -> list[Any]:
    return [part for pair in fields.items() for part in pair]
