"""Hashes of bytes that expire, in Redis or in memory, and claims on them: where sessions and references lie."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from avatar.errors import StoreUnavailable


class Hold(IntEnum):
    """What has become of a claim, and of the hash that it is on."""

    HELD = 0
    FORGOTTEN = 1
    TAKEN = 2
    GONE = 3


@dataclass(frozen=True)
class Claim:
    """Who may be the only one at something, under a key of its own, and for how many seconds if it is not renewed."""

    key: str
    owner: str
    ttl_s: float


class Hashes(Protocol):
    """Hashes of bytes that expire. Times are seconds. StoreUnavailable if the store cannot be reached."""

    async def create(self, key: str, fields: Mapping[str, bytes], ttl_s: float) -> None:
        """Write a hash, in place of one that may be there."""

    async def update(self, key: str, fields: Mapping[str, bytes], ttl_s: float | None) -> bool:
        """Write fields of a hash, and renew it if ttl_s is given; False if the hash is gone."""

    async def read(self, key: str, field: str) -> bytes | None:
        """A field's value, None if there is none."""

    async def expires_in_s(self, key: str) -> float:
        """Seconds until the hash is forgotten; 0 if it is gone."""

    async def delete(self, key: str) -> bool:
        """Forget a hash; False if it was gone."""

    async def claim(self, claim: Claim, *, takes_over: bool = False) -> bool:
        """Become, or stay, the owner; False if there is another one, which is not to be taken over."""

    async def keep(self, claim: Claim, key: str, fields: Mapping[str, bytes], ttl_s: float | None) -> Hold:
        """Stay the owner and then update the hash, in one step. Nothing is written where another or none owns it."""

    async def release(self, claim: Claim) -> None:
        """Stop being the owner."""

    async def aclose(self) -> None:
        """Let go of connections."""


class MemoryHashes:
    """Hashes in this process, for tests and development."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._hashes: dict[str, tuple[dict[str, bytes], float]] = {}

    async def create(self, key: str, fields: Mapping[str, bytes], ttl_s: float) -> None:
        for each in list(self._hashes):
            self._live(each)
        self._hashes[key] = (dict(fields), self._clock() + ttl_s)

    async def update(self, key: str, fields: Mapping[str, bytes], ttl_s: float | None) -> bool:
        found = self._live(key)
        if found is None:
            return False
        held, until = found
        self._hashes[key] = ({**held, **fields}, until if ttl_s is None else self._clock() + ttl_s)
        return True

    async def read(self, key: str, field: str) -> bytes | None:
        found = self._live(key)
        return found[0].get(field) if found else None

    async def expires_in_s(self, key: str) -> float:
        found = self._live(key)
        return found[1] - self._clock() if found else 0.0

    async def delete(self, key: str) -> bool:
        found = self._live(key)
        self._hashes.pop(key, None)
        return found is not None

    async def claim(self, claim: Claim, *, takes_over: bool = False) -> bool:
        owner = await self.read(claim.key, "owner")
        if owner not in (None, claim.owner.encode()) and not takes_over:
            return False
        await self.create(claim.key, {"owner": claim.owner.encode()}, claim.ttl_s)
        return True

    async def keep(self, claim: Claim, key: str, fields: Mapping[str, bytes], ttl_s: float | None) -> Hold:
        if not self._live(claim.key):
            return Hold.FORGOTTEN
        if not await self.claim(claim):
            return Hold.TAKEN
        return Hold.HELD if await self.update(key, fields, ttl_s) else Hold.GONE

    async def release(self, claim: Claim) -> None:
        if await self.read(claim.key, "owner") == claim.owner.encode():
            await self.delete(claim.key)

    async def aclose(self) -> None:
        """Nothing to let go of."""

    def _live(self, key: str) -> tuple[dict[str, bytes], float] | None:
        found = self._hashes.get(key)
        if found and found[1] <= self._clock():
            del self._hashes[key]
            return None
        return found


# Redis writes a field of a hash that is gone as a new hash without a time to live: ask first, in one step.
_UPDATE = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
for i = 2, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
if tonumber(ARGV[1]) > 0 then redis.call('PEXPIRE', KEYS[1], ARGV[1]) end
return 1
"""
_CLAIM = """
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] and ARGV[3] == '0' then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
_KEEP = """
local owner = redis.call('GET', KEYS[1])
if not owner then return 1 end
if owner ~= ARGV[1] then return 2 end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
if redis.call('EXISTS', KEYS[2]) == 0 then return 3 end
for i = 4, #ARGV, 2 do redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1]) end
if tonumber(ARGV[3]) > 0 then redis.call('PEXPIRE', KEYS[2], ARGV[3]) end
return 0
"""
_RELEASE = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
"""


class RedisHashes:
    """Hashes in a Redis or Valkey server. Belongs to the event loop that first uses it."""

    def __init__(self, url: str, timeout_s: float = 2.0) -> None:
        self._redis = open_redis(url, timeout_s)
        self._timeout_s = timeout_s
        self._update = self._redis.register_script(_UPDATE)
        self._claim = self._redis.register_script(_CLAIM)
        self._keep = self._redis.register_script(_KEEP)
        self._release = self._redis.register_script(_RELEASE)

    async def create(self, key: str, fields: Mapping[str, bytes], ttl_s: float) -> None:
        async with self._reached(), self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(key)
            pipe.hset(key, items=_flat(fields))
            pipe.pexpire(key, _ms(ttl_s))
            await pipe.execute()

    async def update(self, key: str, fields: Mapping[str, bytes], ttl_s: float | None) -> bool:
        async with self._reached():
            return bool(await self._update(keys=[key], args=_written(fields, ttl_s)))

    async def read(self, key: str, field: str) -> bytes | None:
        async with self._reached():
            value = await self._redis.hget(key, field)
            assert value is None or isinstance(value, bytes)
            return value

    async def expires_in_s(self, key: str) -> float:
        async with self._reached():
            return max(0, await self._redis.pttl(key)) / 1000

    async def delete(self, key: str) -> bool:
        async with self._reached():
            return bool(await self._redis.delete(key))

    async def claim(self, claim: Claim, *, takes_over: bool = False) -> bool:
        async with self._reached():
            return bool(await self._claim(keys=[claim.key], args=[claim.owner, _ms(claim.ttl_s), int(takes_over)]))

    async def keep(self, claim: Claim, key: str, fields: Mapping[str, bytes], ttl_s: float | None) -> Hold:
        arguments = [claim.owner, _ms(claim.ttl_s), *_written(fields, ttl_s)]
        async with self._reached():
            return Hold(await self._keep(keys=[claim.key, key], args=arguments))

    async def release(self, claim: Claim) -> None:
        async with self._reached():
            await self._release(keys=[claim.key], args=[claim.owner])

    async def aclose(self) -> None:
        await self._redis.aclose()

    def _reached(self) -> AbstractAsyncContextManager[None]:
        return reached(self._timeout_s)


def open_redis(url: str, timeout_s: float) -> redis.asyncio.Redis:
    """A client of a Redis or Valkey server. Belongs to the event loop that first uses it."""
    # No socket_timeout: redis-py keeps it with asyncio.wait_for, which before Python 3.12 swallows a cancellation
    # that comes as the command is sent; a stream that ended would then wait for ever. `reached` bounds the wait.
    # A server that was restarted has closed the connections that are kept here: the second attempt makes another.
    again = Retry(NoBackoff(), 1)
    return redis.asyncio.from_url(url, socket_timeout=None, socket_connect_timeout=timeout_s, retry=again)


@asynccontextmanager
async def reached(timeout_s: float) -> AsyncGenerator[None, None]:
    """Bounds what a Redis client does in the body. StoreUnavailable if the server cannot be reached."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        message = f"the session store did not answer in {timeout_s:g} s"
        raise StoreUnavailable(message, retry_s=1.0) from error
    except RedisError as error:
        raise StoreUnavailable(f"the session store cannot be reached: {error}", retry_s=1.0) from error


def _written(fields: Mapping[str, bytes], ttl_s: float | None) -> list[Any]:
    """What the scripts that write fields are given: milliseconds to live or 0, names and values."""
    return [0 if ttl_s is None else _ms(ttl_s), *_flat(fields)]


def _flat(fields: Mapping[str, bytes]) -> list[Any]:
    return [part for pair in fields.items() for part in pair]


def _ms(seconds: float) -> int:
    return math.ceil(seconds * 1000)
