"""References and their latents, which the sessions of one picture share.

    avatar:reference:{ID}  hash        reference: the constants, under the reference's time to live;
                                       counted_as: the name under which its tenant's quota counts it
    avatar:latents:{ID}    hash        motion, sink: the tensors, which live as long as somebody leases them
    avatar:leases:{ID}     sorted set  who leases the latents: the reference and sessions, each until when

A session that was created keeps the latents when its reference is deleted or expires.
"""

import asyncio
from dataclasses import dataclass
from weakref import WeakValueDictionary

from avatar.errors import ReferenceNotFound
from avatar.store.claims import key
from avatar.store.packing import pack, unpack
from avatar.store.redis import CALL_S, RedisHashes, limited, to_ms
from avatar.worker.v1 import types_pb2 as pb

# A lease is longer than what it is for by this time, in which whoever holds it renews it.
LEASE_MARGIN_S = 60.0
OF_REFERENCE = "reference"

# Lua: keep the latents until the last lease ends. KEYS[1], KEYS[2]: latents, leases.
_EXPIRE = """
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
local last = redis.call('ZREVRANGE', KEYS[2], 0, 0, 'WITHSCORES')
if last[2] then
    redis.call('PEXPIREAT', KEYS[1], last[2])
    redis.call('PEXPIREAT', KEYS[2], last[2])
else
    redis.call('DEL', KEYS[1])
end
"""
# ARGV: name of the lease, milliseconds. Return 0 if there are no latents.
_LEASE = f"""
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('ZADD', KEYS[2], now + ARGV[2], ARGV[1])
{_EXPIRE}
return 1
"""
_RELEASE = "redis.call('ZREM', KEYS[2], ARGV[1])" + _EXPIRE
# KEYS[3]: the reference, or none. ARGV: name of the lease, its milliseconds, motion, sink; with KEYS[3], the reference,
# its milliseconds to live and `counted_as`. Return the former `counted_as`.
_PUT = f"""
redis.call('HSET', KEYS[1], 'motion', ARGV[3], 'sink', ARGV[4])
redis.call('ZADD', KEYS[2], now + ARGV[2], ARGV[1])
local former = false
if KEYS[3] then
    former = redis.call('HGET', KEYS[3], 'counted_as')
    redis.call('HSET', KEYS[3], 'reference', ARGV[5], 'counted_as', ARGV[7])
    redis.call('PEXPIRE', KEYS[3], ARGV[6])
end
{_EXPIRE}
return former or ''
"""
# KEYS[3]: the reference. ARGV[1]: name of its lease. Return `counted_as`, nothing if there is no such reference.
_DELETE = f"""
local counted_as = redis.call('HGET', KEYS[3], 'counted_as')
if redis.call('DEL', KEYS[3]) == 0 then return false end
redis.call('ZREM', KEYS[2], ARGV[1])
{_EXPIRE}
return counted_as or ''
"""


@dataclass(frozen=True)
class Latents:
    """A picture's latents.

    motion: (c, t, h, w), its encoding as a still video, as a serialized Tensor, which streams are opened with. sink:
    (c, 1, h, w), the first sink.
    """

    motion: bytes
    sink: pb.Tensor


class References:
    """References over `hashes`. StoreUnavailable if the server cannot be used.

    A method that needs a reference which does not exist raises ReferenceNotFound; one that reads a damaged value raises
    StateCorrupt.
    """

    def __init__(self, hashes: RedisHashes) -> None:
        self._hashes = hashes

    async def put(self, reference: pb.Reference, ttl_s: float, counted_as: str = "") -> str:
        """Store a reference for ttl_s seconds, in place of one with the same id; return how that one was counted.

        counted_as: its name in the tenant's quota.
        """
        constants = pb.Reference()
        constants.CopyFrom(reference)
        constants.ClearField("motion")
        constants.ClearField("sink")
        keys = [*_latents_keys(reference.id), key("reference", reference.id)]
        args = [OF_REFERENCE, to_ms(ttl_s), pack(reference.motion), pack(reference.sink)]
        former: bytes = await self._hashes.run(_PUT, keys, [*args, pack(constants), to_ms(ttl_s), counted_as], flags="")
        return former.decode()

    async def get(self, reference_id: str) -> pb.Reference:
        """Return a reference, without its latents."""
        [value] = await self._hashes.read(key("reference", reference_id), "reference")
        if value is None:
            raise no_reference(reference_id)
        return unpack(value, pb.Reference, "reference")

    async def expires_in_s(self, reference_id: str) -> float:
        """Return the seconds until a reference expires; 0 if it does not exist."""
        return await self._hashes.expires_in_s(key("reference", reference_id))

    async def delete(self, reference_id: str) -> str:
        """Delete a reference; return how it was counted. Its latents stay as long as sessions lease them."""
        keys = [*_latents_keys(reference_id), key("reference", reference_id)]
        counted_as: bytes | None = await self._hashes.run(_DELETE, keys, [OF_REFERENCE])
        if counted_as is None:
            raise no_reference(reference_id)
        return counted_as.decode()

    async def latents(self, reference_id: str) -> Latents | None:
        """Return the latents, None if nobody leases them."""
        motion, sink = await self._hashes.read(key("latents", reference_id), "motion", "sink")
        if motion is None or sink is None:
            return None
        whole = unpack(motion, pb.Tensor, "motion of reference")
        return Latents(whole.SerializeToString(), unpack(sink, pb.Tensor, "sink of reference"))

    async def sink(self, reference_id: str) -> pb.Tensor | None:
        """Return the sink, None if nobody leases the latents."""
        [sink] = await self._hashes.read(key("latents", reference_id), "sink")
        return None if sink is None else unpack(sink, pb.Tensor, "sink of reference")

    async def lease(self, reference_id: str, name: str, ttl_s: float) -> bool:
        """Keep the latents for ttl_s and LEASE_MARGIN_S; False if they do not exist. `name` has one lease."""
        args = [name, to_ms(ttl_s + LEASE_MARGIN_S)]
        return bool(await self._hashes.run(_LEASE, _latents_keys(reference_id), args))

    async def restore(self, reference_id: str, latents: Latents, name: str, ttl_s: float) -> None:
        """Lease the latents, and write them if the store has lost them."""
        if not await self.lease(reference_id, name, ttl_s):
            args = [name, to_ms(ttl_s + LEASE_MARGIN_S), pack(pb.Tensor.FromString(latents.motion)), pack(latents.sink)]
            await self._hashes.run(_PUT, _latents_keys(reference_id), args, flags="")

    async def release(self, reference_id: str, name: str) -> None:
        """End a lease; the latents are deleted with the last one."""
        await self._hashes.run(_RELEASE, _latents_keys(reference_id), [name])


class SharedLatents:
    """Latents that are read from the store once, and shared by all who use them at a time.

    They are kept as long as somebody refers to them: at a gateway, one copy of each portrait that it streams.
    """

    def __init__(self, references: References) -> None:
        self._references = references
        self._latents = WeakValueDictionary[str, Latents]()
        self._reading = WeakValueDictionary[str, asyncio.Lock]()

    async def get(self, reference_id: str) -> Latents | None:
        """Return a reference's latents, None if they are not stored. StoreUnavailable as `References.latents`."""
        lock = self._reading.setdefault(reference_id, asyncio.Lock())
        # Whoever waits for another's read fails with it, and not after reads of its own, one after another.
        async with limited(CALL_S), lock:
            latents = self._latents.get(reference_id)
            if latents is None and (latents := await self._references.latents(reference_id)):
                self._latents[reference_id] = latents
            return latents


def _latents_keys(reference_id: str) -> list[str]:
    return [key("latents", reference_id), key("leases", reference_id)]


def no_reference(reference_id: str) -> ReferenceNotFound:
    """Return the error for a reference that does not exist, the same for one that belongs to another tenant."""
    return ReferenceNotFound(f"there is no reference {reference_id!r}: create it again")
