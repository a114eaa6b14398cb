"""Resources that tenants use, counted over all gateways, in Redis.

    avatar:held:{LEASES}    sorted set  names, each with the time at which its lease expires
    avatar:spent:{COUNTER}  string      a decimal number

Gateways of two versions count together during an upgrade, so the keys keep their names. A full store still counts.
"""

from enum import IntEnum

from avatar.store.claims import key
from avatar.store.redis import RedisHashes, to_ms

# Lease the name ARGV[1] for ARGV[2] milliseconds: return a Lease. Refused if ARGV[3], unless empty, others are leased
# already. A lease that exists is renewed, unless ARGV[4] is 1. The lease of ARGV[5] ends first. The set expires with
# its last lease.
_LEASE = """
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
redis.call('ZREM', KEYS[1], ARGV[5])
local is_leased = redis.call('ZSCORE', KEYS[1], ARGV[1])
if ARGV[3] ~= '' and not is_leased and redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[3]) then return 0 end
if not is_leased or ARGV[4] == '0' then redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[1]) end
redis.call('PEXPIREAT', KEYS[1], redis.call('ZREVRANGE', KEYS[1], 0, 0, 'WITHSCORES')[2])
return is_leased and 1 or 2
"""
_NAMES = "return redis.call('ZRANGE', KEYS[1], 0, -1)"
_RELEASE = "return redis.call('ZREM', KEYS[1], ARGV[1])"
# Add ARGV[1] to a counter that expires after ARGV[2] milliseconds; return its value.
_ADD = """
local value = redis.call('INCRBYFLOAT', KEYS[1], ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return value
"""
# Add up to ARGV[1], at least ARGV[3], and return how much was added: nothing if the counter has reached the limit
# ARGV[4], or lacks less than a sum of decimals may be wrong by.
_TAKE = """
local left = tonumber(ARGV[4]) - tonumber(redis.call('GET', KEYS[1]) or '0')
if left < 1e-6 then return '0' end
local taken = math.min(tonumber(ARGV[1]), math.max(left, tonumber(ARGV[3])))
redis.call('INCRBYFLOAT', KEYS[1], taken)
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return string.format('%.17g', taken)
"""


class Lease(IntEnum):
    """The outcome of leasing a name; the numbers are those that the script returns."""

    REFUSED = 0
    EXISTED = 1
    NEW = 2


class TenantUsage:
    """Sets of leased names, and counters, over `hashes`. StoreUnavailable if the server cannot be used."""

    def __init__(self, hashes: RedisHashes) -> None:
        self._hashes = hashes

    async def lease(
        self,
        leases: str,
        name: str,
        ttl_s: float,
        limit: int | None = None,
        *,
        renews: bool = True,
        replaces: str = "",
    ) -> Lease:
        """Lease a name in a set for ttl_s from now; REFUSED if `limit` other names are leased.

        renews: a lease that exists ends ttl_s from now, too; else it stays as it is. replaces: a name whose lease ends.
        """
        args: list[str | int] = [name, to_ms(ttl_s), "" if limit is None else limit, int(not renews), replaces]
        return Lease(await self._hashes.run(_LEASE, [key("held", leases)], args))

    async def names(self, leases: str) -> list[str]:
        """Return the names in a set, the one whose lease ends first in front."""
        names: list[bytes] = await self._hashes.run(_NAMES, [key("held", leases)], [], flags="no-writes")
        return [name.decode() for name in names]

    async def release(self, leases: str, name: str) -> None:
        """End a name's lease, if it has one."""
        await self._hashes.run(_RELEASE, [key("held", leases)], [name])

    async def add(self, counter: str, amount: float, ttl_s: float) -> float:
        """Add to a counter, which expires ttl_s after the last addition; return its value."""
        return float(await self._hashes.run(_ADD, [key("spent", counter)], [amount, to_ms(ttl_s)]))

    async def take(self, counter: str, amount: float, least: float, limit: float, ttl_s: float) -> float:
        """Add as much of an amount as the limit leaves, or `least` if that is more; return how much was added.

        0 if the counter has reached the limit: it passes the limit by less than one `least`.
        """
        args = [amount, to_ms(ttl_s), least, limit]
        return float(await self._hashes.run(_TAKE, [key("spent", counter)], args))
