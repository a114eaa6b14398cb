"""Claims: the one stream that a session has, at whichever gateway, and what only this stream may write.

A claim is a hash under a time to live, which its holder renews:

    holder          STREAM@GATEWAY/CELL: a random name, the gateway's advertised address, and the name of its cell
    previous        while `holder` is taking over: the holder before, whose stream is still open
    previous_until  when the claim of `previous` would have expired, in milliseconds since 1970

A take-over moves the claim at once. Until the new stream is open, `previous` keeps its slots at the workers, but for
those that full workers give to the new stream, and writes nothing; `commit` ends it, and `release` gives the claim back
to it, if it still renews. Whoever takes over meanwhile becomes the holder, and `previous` stays: a holder that has not
committed has nothing to give back.

Each change is published, so that the streams concerned look at the claim at once, and not at their next renewal.
"""

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple, Self

from avatar.errors import AvatarError, SessionBusy, SessionClosed, SessionNotFound
from avatar.store.packing import pack_position
from avatar.store.redis import RedisHashes, flat, to_ms
from avatar.worker.v1 import types_pb2 as pb

# A gateway renews the claims of its streams about three times in this time; if it dies, its sessions are free after it.
CLAIM_TTL_S = 10.0
# A closed session's record stays this long, and prevents a stale write from opening it again. So does the mark that a
# deleted session leaves.
CLOSED_TTL_S = 60.0
CHANGES = "avatar:changes"


class Outcome(IntEnum):
    """The outcome of a script; the numbers are those that scripts return.

    DONE: written. GONE: there is no such session. CLOSED: its stream has ended. TAKEN: another stream has the claim.
    EXPIRED: nobody has it. HANDING_OVER: another stream is taking over, and has not committed. TAKEN_OVER: acquired
    from another stream. CHANGED: the record is not as it was read.
    """

    DONE = 0
    GONE = 1
    CLOSED = 2
    TAKEN = 3
    EXPIRED = 4
    HANDING_OVER = 5
    TAKEN_OVER = 6
    CHANGED = 7


class Place(NamedTuple):
    """A session's gateway: its advertised HOST:PORT, empty if it has none, and the name of its cell."""

    gateway: str = ""
    cell: str = ""

    @classmethod
    def of(cls, holder: str) -> Self | None:
        """Return the place of a claim's holder; None if nobody holds it."""
        gateway, _, cell = holder.partition("@")[2].rpartition("/")
        return cls(gateway, cell) if holder else None


NOWHERE = Place()

# KEYS of every script: the claim, the session's record. ARGV begins with the holder and CLAIM_TTL_S in milliseconds.

_ACQUIRE = """
if redis.call('EXISTS', KEYS[2]) == 0 then return {1} end
local ttl = redis.call('HGET', KEYS[2], 'ttl')
local holder = redis.call('HGET', KEYS[1], 'holder')
local outcome = 0
if holder and holder ~= ARGV[1] then
    if ARGV[3] == '0' then return {3} end
    if redis.call('HEXISTS', KEYS[1], 'previous') == 0 then
        redis.call('HSET', KEYS[1], 'previous', holder, 'previous_until', now + redis.call('PTTL', KEYS[1]))
    end
    outcome = 6
end
redis.call('HSET', KEYS[1], 'holder', ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
if outcome == 6 then redis.call('PUBLISH', ARGV[4], ARGV[5]) end
return {outcome, ttl, time[1] * 1000000 + time[2], redis.call('HGETALL', KEYS[2])}
"""
# ARGV[3], ARGV[4]: channel, session id. ARGV[5]: the position, or nothing.
_COMMIT = """
if redis.call('HGET', KEYS[1], 'holder') ~= ARGV[1] then return 3 end
if redis.call('EXISTS', KEYS[2]) == 0 then return 1 end
if redis.call('HEXISTS', KEYS[2], 'closed') == 1 then return 2 end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
if redis.call('HDEL', KEYS[1], 'previous', 'previous_until') > 0 then redis.call('PUBLISH', ARGV[3], ARGV[4]) end
if ARGV[5] then redis.call('HSET', KEYS[2], 'position', ARGV[5]) end
return 0
"""
# ARGV[3]: the position, or an empty string to write nothing. ARGV from 4: the versions of the conditions in use, newest
# last; older ones that are not among them are deleted. The last level may have written one that is newer.
_RENEW = """
local holder = redis.call('HGET', KEYS[1], 'holder')
if not holder then return {4} end
if holder ~= ARGV[1] then
    if redis.call('HGET', KEYS[1], 'previous') ~= ARGV[1] then return {3} end
    redis.call('HSET', KEYS[1], 'previous_until', now + ARGV[2])
    return {5}
end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
if redis.call('EXISTS', KEYS[2]) == 0 then return {1} end
local ttl = redis.call('HGET', KEYS[2], 'ttl')
if redis.call('HEXISTS', KEYS[2], 'closed') == 1 then return {2} end
if ARGV[3] ~= '' then
    redis.call('HSET', KEYS[2], 'position', ARGV[3])
    redis.call('PEXPIRE', KEYS[2], ttl)
    local used, newest = {}, ARGV[4] and tonumber(ARGV[#ARGV]) or 0
    for i = 4, #ARGV do used[ARGV[i]] = true end
    for _, field in ipairs(redis.call('HKEYS', KEYS[2])) do
        local version = string.match(field, '^conditions/(%d+)$')
        if version and not used[version] and tonumber(version) < newest then
            redis.call('HDEL', KEYS[2], field)
        end
    end
end
return {0, ttl}
"""
# KEYS[3]: the mark of a deleted session. ARGV[3]: the record's time to live in milliseconds. ARGV[4]: '0' if a record
# that is missing stays so. ARGV from 5: names and values.
_RESTORE = """
local holder = redis.call('HGET', KEYS[1], 'holder')
if holder and holder ~= ARGV[1] then
    return redis.call('HGET', KEYS[1], 'previous') == ARGV[1] and 5 or 3
end
local is_new = redis.call('EXISTS', KEYS[2]) == 0
if is_new and (redis.call('EXISTS', KEYS[3]) == 1 or ARGV[4] == '0') then return 1 end
if redis.call('HEXISTS', KEYS[2], 'closed') == 1 then return 2 end
redis.call('HSET', KEYS[1], 'holder', ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('HSETNX', KEYS[2], 'ttl', ARGV[3])
for i = 5, #ARGV, 2 do redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1]) end
redis.call('PEXPIRE', KEYS[2], redis.call('HGET', KEYS[2], 'ttl'))
return 0
"""
# ARGV[3]: the position. ARGV[4]: CLOSED_TTL_S in milliseconds.
_CLOSE = """
local holder = redis.call('HGET', KEYS[1], 'holder')
if holder and holder ~= ARGV[1] then return 3 end
if redis.call('EXISTS', KEYS[2]) == 0 then return 1 end
if not holder and redis.call('HEXISTS', KEYS[2], 'closed') == 1 then return 2 end
if holder then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
redis.call('HSET', KEYS[2], 'position', ARGV[3])
if redis.call('HSETNX', KEYS[2], 'closed', 1) == 1 then
    redis.call('PEXPIRE', KEYS[2], math.min(redis.call('PTTL', KEYS[2]), ARGV[4]))
    for _, field in ipairs(redis.call('HKEYS', KEYS[2])) do
        if string.match(field, '^conditions/') then redis.call('HDEL', KEYS[2], field) end
    end
end
return 0
"""
# ARGV[3], ARGV[4]: channel, session id.
_RELEASE = """
local previous = redis.call('HGET', KEYS[1], 'previous')
if previous == ARGV[1] then redis.call('HDEL', KEYS[1], 'previous', 'previous_until') end
if redis.call('HGET', KEYS[1], 'holder') ~= ARGV[1] then return 0 end
local until_ms = tonumber(redis.call('HGET', KEYS[1], 'previous_until') or '0')
redis.call('DEL', KEYS[1])
if previous and until_ms > now then
    redis.call('HSET', KEYS[1], 'holder', previous)
    redis.call('PEXPIREAT', KEYS[1], until_ms)
    redis.call('PUBLISH', ARGV[3], ARGV[4])
end
return 0
"""


class Claim:
    """One stream's claim on its session. It writes nothing once another stream has the claim.

    Methods raise SessionNotFound if the session is deleted or has expired, SessionClosed if its stream has ended, and
    SessionBusy if another stream has the claim.

    session_id: of the session. place: of the stream.
    changed: set when the claim or the session changes elsewhere.
    is_taken_over: another stream had the claim. is_closed: this stream has closed the session.
    ttl_s: the session's time to live, in seconds; 0 once it is gone.
    acquired_us: when it was acquired, in microseconds since 1970 of the store's clock: a later claim's is higher.
    """

    def __init__(self, hashes: RedisHashes, session_id: str, place: Place = NOWHERE) -> None:
        self.session_id = session_id
        self.changed = asyncio.Event()
        self.is_taken_over = self.is_closed = False
        self.ttl_s = 0.0
        self.acquired_us = 0
        self._hashes = hashes
        self._holder = f"{secrets.token_hex(8)}@{place.gateway}/{place.cell}"
        self._keys = [key("claim", session_id), key("session", session_id)]
        self._first = [self._holder, to_ms(CLAIM_TTL_S)]

    def wake_with(self, event: asyncio.Event) -> None:
        """Use another event as `changed`."""
        if self.changed.is_set():
            event.set()
        self.changed = event

    async def acquire(self, *, take_over: bool = False) -> dict[str, bytes]:
        """Acquire the claim; return the fields of the session's record.

        take_over: also from another stream, which keeps its slots until `commit`.
        """
        args = [*self._first, int(take_over), CHANGES, self.session_id]
        outcome, *others = await self._hashes.run(_ACQUIRE, self._keys, args)
        self.is_taken_over = self._record(outcome, *others[:1]) is Outcome.TAKEN_OVER
        self.acquired_us, fields = others[1:]
        return {name.decode(): value for name, value in zip(fields[::2], fields[1::2], strict=True)}

    async def commit(self, position: pb.Position | None = None) -> None:
        """End the stream that had the claim before; write the position if it is given."""
        args = [*self._first, CHANGES, self.session_id, *([pack_position(position)] if position else [])]
        self._record(await self._hashes.run(_COMMIT, self._keys, args))

    async def renew(self, position: pb.Position | None = None, versions: Sequence[int] = ()) -> Outcome:
        """Renew the claim. With a position, write it and restart the session's time to live.

        versions: of the conditions in use, newest last; the others before it are deleted. Return DONE, or why nothing
        was written: HANDING_OVER, or EXPIRED if the store lost its data, since deleting a session leaves its claim.
        """
        args = [*self._first, pack_position(position) if position else b"", *versions]
        return self._record(*await self._hashes.run(_RENEW, self._keys, args))

    async def restore(self, fields: Mapping[str, bytes], ttl_s: float, *, may_create: bool) -> Outcome:
        """Acquire the claim again and write fields of the record. Return DONE or HANDING_OVER.

        may_create: the record too, with this time to live, unless it was deleted. Else SessionNotFound if it is gone.
        """
        keys = [*self._keys, key("deleted", self.session_id)]
        args = [*self._first, to_ms(ttl_s), int(may_create), *flat(fields)]
        return self._record(await self._hashes.run(_RESTORE, keys, args))

    async def close(self, position: pb.Position) -> None:
        """Close the session: nothing opens it again. Its record stays for CLOSED_TTL_S, without its conditions.

        Called again, it renews the claim and writes the position.
        """
        args = [*self._first, pack_position(position), to_ms(CLOSED_TTL_S)]
        self._record(await self._hashes.run(_CLOSE, self._keys, args))
        self.is_closed = True

    async def release(self) -> None:
        """Give the claim up: back to the stream that it was taken from and that is still there, else to nobody."""
        await self._hashes.run(_RELEASE, self._keys, [*self._first, CHANGES, self.session_id])

    def _record(self, code: int, ttl_ms: bytes | None = None) -> Outcome:
        """Return the outcome of a script, or raise its error; keep the record's time to live."""
        outcome = Outcome(code)
        if ttl_ms is not None:
            self.ttl_s = int(ttl_ms) / 1000
        if outcome is Outcome.GONE:
            self.ttl_s = 0.0
        if error := refusal(outcome, self.session_id):
            raise error
        return outcome


def refusal(outcome: Outcome, session_id: str) -> AvatarError | None:
    """Return the error that an outcome stands for, if it is one."""
    match outcome:
        case Outcome.GONE:
            return no_session(session_id)
        case Outcome.CLOSED:
            return SessionClosed(f"the stream of session {session_id!r} has ended; create another session")
        case Outcome.TAKEN:
            return SessionBusy(f"another stream of session {session_id!r} is open; close it first")
    return None


def no_session(session_id: str) -> SessionNotFound:
    """Return the error for a session that does not exist, the same for one that belongs to another tenant."""
    return SessionNotFound(f"there is no session {session_id!r}: it was never created, was deleted or has expired")


def key(kind: str, name: str) -> str:
    """Return a key, whose hash tag is the name: scripts use several keys of one session or reference."""
    return f"avatar:{kind}:{{{name}}}"
