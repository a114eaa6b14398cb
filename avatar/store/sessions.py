"""The session store: each session's constants, numbered conditions and position, in Redis, under a time to live.

Values are the messages of avatar/worker/v1/types.proto, packed by `packing`.

    avatar:session:{ID}    hash    session, position, conditions/0, conditions/1, ...; ttl: its time to live in
                                   milliseconds; closed: there once its stream has ended
    avatar:claim:{ID}      hash    the session's one stream: see `claims`
    avatar:deleted:{ID}    string  mark of a deleted session, so that a stale write does not create it again
    avatar:text:{ID}       hash    embedding of a prompt; ID is derived from the prompt and the encoder

Latents belong to references (`references`): a session leases those of its own.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from google.protobuf.message import Message

from avatar.errors import StateCorrupt, StoreUnavailable
from avatar.store.claims import CHANGES, CLOSED_TTL_S, NOWHERE, Claim, Outcome, Place, key, no_session, refusal
from avatar.store.packing import pack, pack_position, unpack
from avatar.store.redis import RedisHashes, flat, to_ms
from avatar.store.references import Latents, References, no_reference
from avatar.store.registry import WorkerRegistry
from avatar.store.usage import TenantUsage
from avatar.worker.v1 import types_pb2 as pb
from avatar.worker.v1.text_pb2 import EmbedResponse

Stored = TypeVar("Stored", bound=Message)

# KEYS of every script: the session's record. Each returns an Outcome.

# Lua: refuse a record that does not exist, since HSET would create a new one without a time to live, or is closed.
_CHECK = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 1 end
if redis.call('HEXISTS', KEYS[1], 'closed') == 1 then return 2 end
"""
_UPDATE = f"""{_CHECK}
for i = 1, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
return 0
"""
# KEYS[2]: the claim. ARGV[1]: the position as it was read. ARGV[2]: a field to delete.
_UPDATE_IDLE = f"""{_CHECK}
if redis.call('EXISTS', KEYS[2]) == 1 then return 3 end
if redis.call('HGET', KEYS[1], 'position') ~= ARGV[1] then return 7 end
redis.call('HDEL', KEYS[1], ARGV[2])
for i = 3, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
return 0
"""
_SET_TTL = f"""{_CHECK}
redis.call('HSET', KEYS[1], 'ttl', ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return 0
"""
# KEYS[2]: the mark. ARGV: its milliseconds to live, channel, session id.
_DELETE = """
if redis.call('DEL', KEYS[1]) == 0 then return 1 end
redis.call('SET', KEYS[2], 1, 'PX', ARGV[1])
redis.call('PUBLISH', ARGV[2], ARGV[3])
return 0
"""
_DELETE_CLOSED = "return redis.call('HEXISTS', KEYS[1], 'closed') == 1 and redis.call('DEL', KEYS[1])"
# KEYS[2]: the claim. Return the record's milliseconds to live, the claim's holder, and the values of STATUS_FIELDS.
_STATUS = """
local fields = redis.call('HMGET', KEYS[1], unpack(ARGV))
return {redis.call('PTTL', KEYS[1]), redis.call('HGET', KEYS[2], 'holder'), fields}
"""
STATUS_FIELDS = ("session", "position", "ttl", "closed")


class SessionRecord:
    """Fields of a session's record, read at once.

    Each is parsed when it is used: SessionNotFound if it is missing, StateCorrupt if it is damaged.
    """

    def __init__(self, session_id: str, fields: Mapping[str, bytes | None]) -> None:
        self._session_id, self._fields = session_id, fields

    @cached_property
    def session(self) -> pb.Session:
        """The session's constants, without the motion latents."""
        return self._unpack("session", pb.Session)

    @cached_property
    def position(self) -> pb.Position:
        """The next block and frame, whether the session is closed, and its time to live."""
        position = self._unpack("position", pb.Position)
        position.ttl_s = int(self._fields.get("ttl") or 0) / 1000
        position.is_closed = self._fields.get("closed") is not None
        return position

    def conditions(self, version: int, sink: pb.Tensor | None = None) -> pb.Conditions:
        """Return one version of the conditions. sink: of the reference, for conditions that have none of their own."""
        conditions = self._unpack(f"conditions/{version}", pb.Conditions)
        if sink is not None and not conditions.HasField("sink"):
            conditions.sink.CopyFrom(sink)
        return conditions

    def _unpack(self, field: str, kind: type[Stored]) -> Stored:
        if (value := self._fields.get(field)) is None:
            raise no_session(self._session_id)
        return unpack(value, kind, f"{field} of session {self._session_id!r}")


@dataclass(frozen=True)
class SessionStatus:
    """A session's constants and position, and the seconds until it expires.

    place: where its stream is open; None if none is.
    """

    session: pb.Session
    position: pb.Position
    place: Place | None
    expires_in_s: float


class SessionStore:
    """Sessions and prompt embeddings over `hashes`. StoreUnavailable if the server cannot be used.

    A method that needs a session which does not exist raises SessionNotFound; one that changes a session whose stream
    has ended, SessionClosed; one that reads a damaged value, StateCorrupt.

    references, usage: of the same server.
    """

    def __init__(self, hashes: RedisHashes) -> None:
        self._hashes = hashes
        self.references, self.usage = References(hashes), TenantUsage(hashes)

    async def put_embedding(self, name: str, embedding: EmbedResponse, ttl_s: float) -> None:
        """Store a prompt's embedding under a name that is derived from the prompt and the encoder alone."""
        await self._hashes.create(key("text", name), {"embedding": pack(embedding)}, ttl_s)

    async def embedding(self, name: str) -> EmbedResponse | None:
        """Return the embedding of this name, None if it is not stored."""
        [value] = await self._hashes.read(key("text", name), "embedding")
        return None if value is None else unpack(value, EmbedResponse, f"embedding {name}")

    async def create(self, session: pb.Session, conditions: pb.Conditions, position: pb.Position) -> None:
        """Write a new session with its first conditions; position.ttl_s is its time to live in seconds.

        ReferenceNotFound if there are no latents of its reference, which it leases.
        """
        if not await self.references.lease(session.reference_id, session.id, position.ttl_s):
            raise no_reference(session.reference_id)
        fields = {
            "session": pack(session),
            "position": pack_position(position),
            f"conditions/{conditions.version}": pack(conditions),
            "ttl": str(to_ms(position.ttl_s)).encode(),
        }
        try:
            await self._hashes.create(key("session", session.id), fields, position.ttl_s)
        except StoreUnavailable:
            with suppress(StoreUnavailable):
                await self.references.release(session.reference_id, session.id)
            raise

    async def session(self, session_id: str) -> pb.Session:
        """Return a session's constants, without the motion latents."""
        return (await self._read(session_id, "session")).session

    async def status(self, session_id: str) -> SessionStatus:
        """Return a session's status."""
        keys = [key("session", session_id), key("claim", session_id)]
        ttl_ms, holder, values = await self._hashes.run(_STATUS, keys, STATUS_FIELDS, flags="no-writes")
        record = SessionRecord(session_id, dict(zip(STATUS_FIELDS, values, strict=True)))
        return SessionStatus(record.session, record.position, Place.of((holder or b"").decode()), ttl_ms / 1000)

    async def acquire(self, claim: Claim, *, take_over: bool = False) -> SessionRecord:
        """Acquire a claim; return the session's record, with all conditions. Raises as Claim.acquire does."""
        return SessionRecord(claim.session_id, await claim.acquire(take_over=take_over))

    async def conditions(self, session_id: str, version: int) -> pb.Conditions:
        """Return one version of a session's conditions, with the reference's sink where it has none of its own.

        SessionNotFound if it was not written.
        """
        name = f"conditions/{version}"
        record = await self._read(session_id, name, "session")
        conditions = record.conditions(version)
        if not conditions.HasField("sink"):
            if (sink := await self.references.sink(record.session.reference_id)) is None:
                raise no_session(session_id)
            conditions.sink.CopyFrom(sink)
        return conditions

    async def put_conditions(self, session_id: str, conditions: pb.Conditions) -> None:
        """Write a version of the conditions, for a gateway that resumes the session."""
        await self._update(session_id, {f"conditions/{conditions.version}": pack(conditions)})

    async def put_prompt(self, session: pb.Session, conditions: pb.Conditions) -> None:
        """Write a session's constants, in which the prompt has changed, and the conditions with its embedding."""
        await self._update(session.id, {"session": pack(session), f"conditions/{conditions.version}": pack(conditions)})

    async def put_idle_prompt(
        self, session: pb.Session, conditions: pb.Conditions, before: pb.Position, after: pb.Position, replaced: int
    ) -> Outcome:
        """Write as `put_prompt` does, and the position, while no stream has a claim; delete the version `replaced`.

        Return DONE, TAKEN if a stream has a claim, or CHANGED if the position is no longer as it was `before`.
        """
        fields = {
            "session": pack(session),
            f"conditions/{conditions.version}": pack(conditions),
            "position": pack_position(after),
        }
        keys = [key("session", session.id), key("claim", session.id)]
        args = [pack_position(before), f"conditions/{replaced}", *flat(fields)]
        outcome = Outcome(await self._hashes.run(_UPDATE_IDLE, keys, args))
        if outcome is not Outcome.TAKEN and (error := refusal(outcome, session.id)):
            raise error
        return outcome

    async def position(self, session_id: str) -> pb.Position:
        """Return a session's position: the next block and frame, whether it is closed, and its time to live."""
        return (await self._read(session_id, "position", "ttl", "closed")).position

    async def set_ttl(self, session_id: str, ttl_s: float) -> None:
        """Change a session's time to live, and restart it; its stream goes on with the new one, at any gateway."""
        self._check(await self._hashes.run(_SET_TTL, [key("session", session_id)], [to_ms(ttl_s)]), session_id)
        await self.references.lease((await self.session(session_id)).reference_id, session_id, ttl_s)

    async def delete(self, session_id: str) -> None:
        """Delete a session, and end its lease of the latents. Its stream ends; nothing creates it again."""
        reference_id = ""
        with suppress(StateCorrupt):
            reference_id = (await self.session(session_id)).reference_id
        keys = [key("session", session_id), key("deleted", session_id)]
        self._check(await self._hashes.run(_DELETE, keys, [to_ms(CLOSED_TTL_S), CHANGES, session_id]), session_id)
        await self.references.release(reference_id, session_id)

    async def delete_closed(self, session_id: str) -> bool:
        """Delete a session whose stream has ended; False if it is not closed, or does not exist."""
        return bool(await self._hashes.run(_DELETE_CLOSED, [key("session", session_id)], []))

    def workers(self, cell: str) -> WorkerRegistry:
        """Return the registry of a cell's workers, which is in the same server."""
        return WorkerRegistry(self._hashes, cell)

    def claim(self, session_id: str, place: Place = NOWHERE) -> Claim:
        """Return a claim on a session, not acquired yet. place: of the stream."""
        return Claim(self._hashes, session_id, place)

    def changes(self) -> AsyncGenerator[str, None]:
        """Yield the id of each session whose claim moves or that is deleted, from now on, for ever."""
        return self._hashes.messages(CHANGES)

    async def restore(
        self,
        claim: Claim,
        session: pb.Session,
        latents: Latents,
        versions: Sequence[pb.Conditions],
        position: pb.Position,
        *,
        may_create: bool = True,
    ) -> Outcome:
        """Write a streaming session again, after the store was unreachable and may have lost all or part of it.

        versions: the conditions in use. Returns and raises as Claim.restore.
        """
        fields = {f"conditions/{each.version}": pack(each) for each in versions}
        fields |= {"session": pack(session), "position": pack_position(position)}
        ttl_s = claim.ttl_s or position.ttl_s
        outcome = await claim.restore(fields, ttl_s, may_create=may_create)
        if outcome is Outcome.DONE:
            await self.references.restore(session.reference_id, latents, session.id, ttl_s)
        return outcome

    async def close(self, claim: Claim, session: pb.Session, position: pb.Position) -> None:
        """Close a session as Claim.close does, and end its lease of the latents."""
        await claim.close(position)
        await self.references.release(session.reference_id, session.id)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._hashes.aclose()

    async def _update(self, session_id: str, fields: dict[str, bytes]) -> None:
        self._check(await self._hashes.run(_UPDATE, [key("session", session_id)], flat(fields)), session_id)

    async def _read(self, session_id: str, *fields: str) -> SessionRecord:
        values = await self._hashes.read(key("session", session_id), *fields)
        return SessionRecord(session_id, dict(zip(fields, values, strict=True)))

    def _check(self, outcome: int, session_id: str) -> None:
        if error := refusal(Outcome(outcome), session_id):
            raise error
