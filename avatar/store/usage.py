"""Resources that tenants use, counted over all gateways, in Redis.

    avatar:held:{LEASES}    sorted set  names, each with the time at which its lease expires
    avatar:spent:{COUNTER}  string      a decimal number

A gateway renews the leases of its open streams; if it dies, they expire. Gateways of two versions count together during
an upgrade, so the keys keep their names.
"""

from contextlib import AbstractAsyncContextManager

from avatar.store.redis import open_redis, redis_call, to_ms

# Lease the name ARGV[1] for ARGV[2] milliseconds: return 0 if ARGV[3], unless empty, others are leased already. Times
# are the server's, since the gateways' clocks may differ. The set expires with its last lease.
_LEASE = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
local is_leased = redis.call('ZSCORE', KEYS[1], ARGV[1])
if ARGV[3] ~= '' and not is_leased and redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[3]) then return 0 end
redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[1])
redis.call('PEXPIREAT', KEYS[1], redis.call('ZREVRANGE', KEYS[1], 0, 0, 'WITHSCORES')[2])
return 1
"""


class TenantUsage:
    """Sets of leased names, and counters. Every method raises StoreUnavailable if the server cannot be reached.

    An instance belongs to the event loop that first uses it. timeout_s: limit on each call.
    """

    def __init__(self, url: str, timeout_s: float = 2.0) -> None:
        self._redis = open_redis(url, timeout_s)
        self._timeout_s = timeout_s
        self._lease = self._redis.register_script(_LEASE)

    async def lease(self, leases: str, name: str, ttl_s: float, limit: int | None = None) -> bool:
        """Lease a name in a set for ttl_s from now, or renew its lease; False if `limit` other names are leased."""
        args: list[str | int] = [name, to_ms(ttl_s), "" if limit is None else limit]
        async with self._call():
            return bool(await self._lease(keys=[f"avatar:held:{{{leases}}}"], args=args))

    async def release(self, leases: str, name: str) -> None:
        """End a name's lease, if it has one."""
        async with self._call():
            await self._redis.zrem(f"avatar:held:{{{leases}}}", name)

    async def add(self, counter: str, amount: float, ttl_s: float) -> float:
        """Add to a counter, which expires ttl_s after the last addition; return its value."""
        key = f"avatar:spent:{{{counter}}}"
        async with self._call(), self._redis.pipeline(transaction=True) as pipe:
            pipe.incrbyfloat(key, amount)
            pipe.pexpire(key, to_ms(ttl_s))
            value, _ = await pipe.execute()
            return float(value)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    def _call(self) -> AbstractAsyncContextManager[None]:
        return redis_call(self._timeout_s)
