"""Where sessions are kept: constants, numbered conditions and position, in Redis or in memory, under a time to live.

Values are the messages of avatar/worker/v1/types.proto with a version byte and a checksum in front: numbers raw, with
dtype and shape. What is damaged or foreign, or whose numbers do not fill their shape, is refused; nothing is ever
unpickled.

    avatar:session:{ID}    hash   session, position, conditions/0, conditions/1, ...
    avatar:stream:{ID}     string owner of the one stream that may be open
    avatar:reference:{ID}  hash   reference
    avatar:text:{ID}       hash   embedding; named by prompt and encoder, for whoever embeds the same again
"""

import asyncio
import math
import time
import zlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol, TypeVar

import redis.asyncio
from google.protobuf.message import Message
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from avatar.errors import ReferenceNotFound, SessionBusy, SessionNotFound, StateCorrupt, StoreUnavailable
from avatar.worker.v1 import types_pb2 as pb
from avatar.worker.v1.text_pb2 import EmbedResponse

Kept = TypeVar("Kept", bound=Message)
VERSION = b"\x01"
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1}
# A stream's owner renews its claim about three times in this many seconds; a gateway that dies frees its sessions then.
CLAIM_TTL_S = 10.0


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


class SessionStore:
    """Sessions, references and embeddings of prompts over hashes."""

    def __init__(self, hashes: Hashes) -> None:
        self._hashes = hashes

    async def put_reference(self, reference: pb.Reference, ttl_s: float) -> None:
        await self._hashes.create(_reference_key(reference.id), {"reference": _pack(reference)}, ttl_s)

    async def reference(self, reference_id: str) -> pb.Reference:
        value = await self._hashes.read(_reference_key(reference_id), "reference")
        if value is None:
            raise no_reference(reference_id)
        return _unpack(value, pb.Reference, "reference")

    async def reference_expires_in_s(self, reference_id: str) -> float:
        return await self._hashes.expires_in_s(_reference_key(reference_id))

    async def delete_reference(self, reference_id: str) -> None:
        if not await self._hashes.delete(_reference_key(reference_id)):
            raise no_reference(reference_id)

    async def put_embedding(self, name: str, embedding: EmbedResponse, ttl_s: float) -> None:
        """Keep the embedding of a prompt under a name that prompt and encoder alone decide."""
        await self._hashes.create(_text_key(name), {"embedding": _pack(embedding)}, ttl_s)

    async def embedding(self, name: str) -> EmbedResponse | None:
        """The embedding of this name, None if it is not kept. StateCorrupt if what is kept is none."""
        value = await self._hashes.read(_text_key(name), "embedding")
        return None if value is None else _unpack(value, EmbedResponse, f"embedding {name}")

    async def create(self, session: pb.Session, conditions: pb.Conditions, position: pb.Position) -> None:
        fields = {
            "session": _pack(session),
            "position": _pack(position),
            f"conditions/{conditions.version}": _pack(conditions),
        }
        await self._hashes.create(_session_key(session.id), fields, position.ttl_s)

    async def session(self, session_id: str) -> pb.Session:
        return await self._field(session_id, "session", pb.Session)

    async def put_session(self, session: pb.Session) -> None:
        """Write what has changed of a session."""
        if not await self._hashes.update(_session_key(session.id), {"session": _pack(session)}, None):
            raise no_session(session.id)

    async def conditions(self, session_id: str, version: int) -> pb.Conditions:
        return await self._field(session_id, f"conditions/{version}", pb.Conditions)

    async def put_conditions(self, session_id: str, conditions: pb.Conditions) -> None:
        """Write a version of the conditions, before any block names it."""
        fields = {f"conditions/{conditions.version}": _pack(conditions)}
        if not await self._hashes.update(_session_key(session_id), fields, None):
            raise no_session(session_id)

    async def position(self, session_id: str) -> pb.Position:
        return await self._field(session_id, "position", pb.Position)

    async def renew(self, session_id: str, position: pb.Position) -> None:
        """Write how far the session is, and start its time to live anew."""
        fields = {"position": _pack(position)}
        if not await self._hashes.update(_session_key(session_id), fields, position.ttl_s):
            raise no_session(session_id)

    async def expires_in_s(self, session_id: str) -> float:
        """Seconds until the session is forgotten. SessionNotFound if it already is."""
        left = await self._hashes.expires_in_s(_session_key(session_id))
        if not left:
            raise no_session(session_id)
        return left

    async def delete(self, session_id: str) -> None:
        if not await self._hashes.delete(_session_key(session_id)):
            raise no_session(session_id)

    async def restore(self, session: pb.Session, versions: Sequence[pb.Conditions], position: pb.Position) -> None:
        """Write a session that streams as it is now: the store was away, and may have lost some of it, or all.

        versions: of its conditions, those that are in use.
        """
        if not await self._hashes.expires_in_s(_session_key(session.id)):
            await self.create(session, versions[-1], position)
        for conditions in versions:
            await self.put_conditions(session.id, conditions)

    async def claim(self, session_id: str, owner: str, *, takes_over: bool = False) -> None:
        """Become, or stay, the one stream of the session. SessionBusy if there is another, unless it is taken over."""
        if not await self._hashes.claim(_claim(session_id, owner), takes_over=takes_over):
            raise session_busy(session_id)

    async def is_claimed(self, session_id: str) -> bool:
        return await self._hashes.expires_in_s(_stream_key(session_id)) > 0

    async def keep(self, session_id: str, owner: str, position: pb.Position | None = None) -> bool:
        """Stay the one stream of the session, and `renew` it where a position is given.

        False if the claim is forgotten, and nothing written: the store was emptied, since a session that is deleted
        keeps its claim. SessionBusy if there is another stream, SessionNotFound if the session is deleted.
        """
        fields, ttl_s = ({"position": _pack(position)}, position.ttl_s) if position else ({}, None)
        hold = await self._hashes.keep(_claim(session_id, owner), _session_key(session_id), fields, ttl_s)
        if hold is Hold.TAKEN:
            raise session_busy(session_id)
        if hold is Hold.GONE:
            raise no_session(session_id)
        return hold is Hold.HELD

    async def release(self, session_id: str, owner: str) -> None:
        await self._hashes.release(_claim(session_id, owner))

    async def aclose(self) -> None:
        await self._hashes.aclose()

    async def _field(self, session_id: str, field: str, kind: type[Kept]) -> Kept:
        value = await self._hashes.read(_session_key(session_id), field)
        if value is None:
            raise no_session(session_id)
        return _unpack(value, kind, f"{field} of session {session_id!r}")


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


def _session_key(session_id: str) -> str:
    return f"avatar:session:{{{session_id}}}"


def _stream_key(session_id: str) -> str:
    return f"avatar:stream:{{{session_id}}}"


def _claim(session_id: str, owner: str) -> Claim:
    return Claim(_stream_key(session_id), owner, CLAIM_TTL_S)


def _reference_key(reference_id: str) -> str:
    return f"avatar:reference:{{{reference_id}}}"


def _text_key(name: str) -> str:
    return f"avatar:text:{{{name}}}"


def no_session(session_id: str) -> SessionNotFound:
    return SessionNotFound(f"there is no session {session_id!r}: it was never created, was deleted or has expired")


def session_busy(session_id: str) -> SessionBusy:
    return SessionBusy(f"another stream of session {session_id!r} is open; close it first")


def no_reference(reference_id: str) -> ReferenceNotFound:
    return ReferenceNotFound(f"there is no reference {reference_id!r}: create it again")


def _pack(message: Message) -> bytes:
    data = message.SerializeToString()
    return VERSION + _checksum(type(message), data) + data


def _unpack(value: bytes, kind: type[Kept], what: str) -> Kept:
    version, checksum, data = value[:1], value[1:5], value[5:]
    if version != VERSION:
        raise StateCorrupt(f"{what} has version byte {version!r}, expected {VERSION!r}")
    if checksum != _checksum(kind, data):
        raise StateCorrupt(f"{what} is damaged, or is no {kind.DESCRIPTOR.name}")
    message = kind()
    message.ParseFromString(data)
    for descriptor, content in message.ListFields():
        if isinstance(content, pb.Tensor) and not _is_whole(content):
            raise StateCorrupt(f"{descriptor.name} of {what} does not fill its shape")
    return message


def _checksum(kind: type[Message], data: bytes) -> bytes:
    """Four bytes for this kind of message and these bytes: what is cut short or of another kind may well parse."""
    return zlib.crc32(data, zlib.crc32(kind.DESCRIPTOR.full_name.encode())).to_bytes(4, "big")


def _is_whole(tensor: pb.Tensor) -> bool:
    item_bytes = ITEM_BYTES.get(tensor.dtype)
    return item_bytes is not None and len(tensor.data) == item_bytes * math.prod(tensor.shape)
