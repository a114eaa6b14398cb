"""What each tenant holds and has spent, counted over all gateways: in Redis, or in memory.

avatar:held:{SET}   sorted set  names that are held, each until a time; who holds one and dies frees it then
avatar:spent:{SUM}  string      a decimal number
"""

import math
import time
from collections.abc import Callable
from typing import Protocol

from avatar.store.redis import open_redis, reached


class Tally(Protocol):
    """Sets of names that are held for a while, and sums. StoreUnavailable if it cannot be reached."""

    async def hold(self, held: str, name: str, ttl_s: float, most: int | None = None) -> bool:
        """Have a name in a set for ttl_s from now, whether it was there or not; False if `most` others are in it."""

    async def let_go(self, held: str, name: str) -> None:
        """Have a name in the set no more."""

    async def spend(self, purse: str, amount: float, ttl_s: float) -> float:
        """Add to a sum, which is forgotten ttl_s after the last time; all that was added."""

    async def aclose(self) -> None:
        """Let go of connections."""


class MemoryTally:
    """A tally in this process, for tests and development."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._held: dict[str, dict[str, float]] = {}
        self._spent: dict[str, tuple[float, float]] = {}

    async def hold(self, held: str, name: str, ttl_s: float, most: int | None = None) -> bool:
        now = self._clock()
        names = {each: until for each, until in self._held.get(held, {}).items() if until > now}
        is_free = most is None or name in names or len(names) < most
        self._held[held] = {**names, name: now + ttl_s} if is_free else names
        return is_free

    async def let_go(self, held: str, name: str) -> None:
        self._held.get(held, {}).pop(name, None)

    async def spend(self, purse: str, amount: float, ttl_s: float) -> float:
        now = self._clock()
        self._spent = {each: kept for each, kept in self._spent.items() if kept[1] > now}
        spent = self._spent.get(purse, (0.0, 0.0))[0] + amount
        self._spent[purse] = spent, now + ttl_s
        return spent

    async def aclose(self) -> None:
        """Nothing to let go of."""


# By the server's clock: those of the gateways may differ.
_HOLD = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
local is_in = redis.call('ZSCORE', KEYS[1], ARGV[1])
if ARGV[3] ~= '' and not is_in and redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[3]) then return 0 end
redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[1])
redis.call('PEXPIREAT', KEYS[1], redis.call('ZREVRANGE', KEYS[1], 0, 0, 'WITHSCORES')[2])
return 1
"""


class RedisTally:
    """A tally in a Redis or Valkey server. Belongs to the event loop that first uses it."""

    def __init__(self, url: str, timeout_s: float = 2.0) -> None:
        self._redis = open_redis(url, timeout_s)
        self._timeout_s = timeout_s
        self._hold = self._redis.register_script(_HOLD)

    async def hold(self, held: str, name: str, ttl_s: float, most: int | None = None) -> bool:
        limit = "" if most is None else most
        async with reached(self._timeout_s):
            return bool(await self._hold(keys=[f"avatar:held:{{{held}}}"], args=[name, _ms(ttl_s), limit]))

    async def let_go(self, held: str, name: str) -> None:
        async with reached(self._timeout_s):
            await self._redis.zrem(f"avatar:held:{{{held}}}", name)

    async def spend(self, purse: str, amount: float, ttl_s: float) -> float:
        key = f"avatar:spent:{{{purse}}}"
        async with reached(self._timeout_s), self._redis.pipeline(transaction=True) as pipe:
            pipe.incrbyfloat(key, amount)
            pipe.pexpire(key, _ms(ttl_s))
            spent, _ = await pipe.execute()
            return float(spent)

    async def aclose(self) -> None:
        await self._redis.aclose()


def _ms(seconds: float) -> int:
    return math.ceil(seconds * 1000)
