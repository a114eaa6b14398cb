"""The session store: each session's constants, numbered conditions and position, in Redis, under a time to live.

Values are the messages of avatar/worker/v1/types.proto after a version byte and a checksum; tensors are raw numbers
with dtype and shape. Reading refuses a value that is damaged or of another kind, or a tensor that does not fill its
shape. Nothing is ever unpickled.

    avatar:session:{ID}    hash    session, position, conditions/0, conditions/1, ...
    avatar:stream:{ID}     string  lock of the session's one stream; its value is the owner
    avatar:reference:{ID}  hash    reference
    avatar:text:{ID}       hash    embedding of a prompt; ID is derived from the prompt and the encoder
"""

import math
import zlib
from collections.abc import Sequence
from typing import TypeVar

from google.protobuf.message import Message

from avatar.errors import ReferenceNotFound, SessionBusy, SessionNotFound, StateCorrupt
from avatar.store.redis import Lock, RedisHashes, Renewal
from avatar.worker.v1 import types_pb2 as pb
from avatar.worker.v1.text_pb2 import EmbedResponse

Stored = TypeVar("Stored", bound=Message)
VERSION = b"\x01"
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1}
# A gateway renews the locks of its streams about three times in this time; if it dies, its sessions are free after it.
LOCK_TTL_S = 10.0


class SessionStore:
    """Sessions, references and prompt embeddings over `hashes`. StoreUnavailable if the server cannot be reached.

    A method that needs a session or reference which does not exist raises SessionNotFound or ReferenceNotFound; one
    that reads a damaged value raises StateCorrupt.
    """

    def __init__(self, hashes: RedisHashes) -> None:
        self._hashes = hashes

    async def put_reference(self, reference: pb.Reference, ttl_s: float) -> None:
        """Store a reference for ttl_s seconds, in place of one with the same id."""
        await self._hashes.create(_key("reference", reference.id), {"reference": _pack(reference)}, ttl_s)

    async def reference(self, reference_id: str) -> pb.Reference:
        """Return a reference."""
        value = await self._hashes.read(_key("reference", reference_id), "reference")
        if value is None:
            raise no_reference(reference_id)
        return _unpack(value, pb.Reference, "reference")

    async def reference_expires_in_s(self, reference_id: str) -> float:
        """Return the seconds until a reference expires; 0 if it does not exist."""
        return await self._hashes.expires_in_s(_key("reference", reference_id))

    async def delete_reference(self, reference_id: str) -> None:
        """Delete a reference."""
        if not await self._hashes.delete(_key("reference", reference_id)):
            raise no_reference(reference_id)

    async def put_embedding(self, name: str, embedding: EmbedResponse, ttl_s: float) -> None:
        """Store a prompt's embedding under a name that is derived from the prompt and the encoder alone."""
        await self._hashes.create(_key("text", name), {"embedding": _pack(embedding)}, ttl_s)

    async def embedding(self, name: str) -> EmbedResponse | None:
        """Return the embedding of this name, None if it is not stored."""
        value = await self._hashes.read(_key("text", name), "embedding")
        return None if value is None else _unpack(value, EmbedResponse, f"embedding {name}")

    async def create(self, session: pb.Session, conditions: pb.Conditions, position: pb.Position) -> None:
        """Write a new session with its first conditions; position.ttl_s is its time to live in seconds."""
        fields = {
            "session": _pack(session),
            "position": _pack(position),
            f"conditions/{conditions.version}": _pack(conditions),
        }
        await self._hashes.create(_key("session", session.id), fields, position.ttl_s)

    async def session(self, session_id: str) -> pb.Session:
        """Return a session's constants."""
        return await self._field(session_id, "session", pb.Session)

    async def put_session(self, session: pb.Session) -> None:
        """Replace a session's constants."""
        await self._update(session.id, "session", session)

    async def conditions(self, session_id: str, version: int) -> pb.Conditions:
        """Return one version of a session's conditions. SessionNotFound if it was not written."""
        return await self._field(session_id, f"conditions/{version}", pb.Conditions)

    async def put_conditions(self, session_id: str, conditions: pb.Conditions) -> None:
        """Write a version of the conditions, for a gateway that resumes the session."""
        await self._update(session_id, f"conditions/{conditions.version}", conditions)

    async def position(self, session_id: str) -> pb.Position:
        """Return a session's position: the next block and frame, and the time to live."""
        return await self._field(session_id, "position", pb.Position)

    async def renew(self, session_id: str, position: pb.Position) -> None:
        """Write a session's position and restart its time to live."""
        await self._update(session_id, "position", position, position.ttl_s)

    async def expires_in_s(self, session_id: str) -> float:
        """Return the seconds until the session expires."""
        remaining_s = await self._hashes.expires_in_s(_key("session", session_id))
        if not remaining_s:
            raise no_session(session_id)
        return remaining_s

    async def delete(self, session_id: str) -> None:
        """Delete a session; the lock of its stream stays until it is released or expires."""
        if not await self._hashes.delete(_key("session", session_id)):
            raise no_session(session_id)

    async def restore(self, session: pb.Session, versions: Sequence[pb.Conditions], position: pb.Position) -> None:
        """Write a streaming session again, after the store was unreachable and may have lost all or part of it.

        versions: the conditions in use.
        """
        if not await self._hashes.expires_in_s(_key("session", session.id)):
            await self.create(session, versions[-1], position)
        for conditions in versions:
            await self.put_conditions(session.id, conditions)

    async def acquire_lock(self, session_id: str, owner: str, *, take_over: bool = False) -> None:
        """Acquire, or renew, the lock of the session's stream. SessionBusy if another owner has it.

        take_over: take the lock from another owner.
        """
        if not await self._hashes.acquire(_lock(session_id, owner), take_over=take_over):
            raise session_busy(session_id)

    async def is_locked(self, session_id: str) -> bool:
        """Return whether a stream of the session is open at any gateway."""
        return await self._hashes.expires_in_s(_key("stream", session_id)) > 0

    async def renew_lock(self, session_id: str, owner: str, position: pb.Position | None = None) -> bool:
        """Renew the lock of the session's stream, and `renew` the session if a position is given.

        False, with nothing written, if the lock does not exist: the store has lost its data, since deleting a session
        leaves its lock. SessionBusy if another owner has the lock, SessionNotFound if the session is deleted.
        """
        fields, ttl_s = ({"position": _pack(position)}, position.ttl_s) if position else ({}, None)
        renewal = await self._hashes.renew(_lock(session_id, owner), _key("session", session_id), fields, ttl_s)
        if renewal is Renewal.LOCK_TAKEN:
            raise session_busy(session_id)
        if renewal is Renewal.HASH_GONE:
            raise no_session(session_id)
        return renewal is Renewal.RENEWED

    async def release_lock(self, session_id: str, owner: str) -> None:
        """Release the lock of the session's stream, if the owner has it."""
        await self._hashes.release(_lock(session_id, owner))

    async def aclose(self) -> None:
        """Close the connections."""
        await self._hashes.aclose()

    async def _update(self, session_id: str, field: str, message: Message, ttl_s: float | None = None) -> None:
        if not await self._hashes.update(_key("session", session_id), {field: _pack(message)}, ttl_s):
            raise no_session(session_id)

    async def _field(self, session_id: str, field: str, kind: type[Stored]) -> Stored:
        value = await self._hashes.read(_key("session", session_id), field)
        if value is None:
            raise no_session(session_id)
        return _unpack(value, kind, f"{field} of session {session_id!r}")


def _key(kind: str, name: str) -> str:
    return f"avatar:{kind}:{{{name}}}"


def _lock(session_id: str, owner: str) -> Lock:
    return Lock(_key("stream", session_id), owner, LOCK_TTL_S)


def no_session(session_id: str) -> SessionNotFound:
    """Return the error for a session that does not exist, the same for one that belongs to another tenant."""
    return SessionNotFound(f"there is no session {session_id!r}: it was never created, was deleted or has expired")


def session_busy(session_id: str) -> SessionBusy:
    return SessionBusy(f"another stream of session {session_id!r} is open; close it first")


def no_reference(reference_id: str) -> ReferenceNotFound:
    """Return the error for a reference that does not exist, the same for one that belongs to another tenant."""
    return ReferenceNotFound(f"there is no reference {reference_id!r}: create it again")


def _pack(message: Message) -> bytes:
    data = message.SerializeToString()
    return VERSION + _checksum(type(message), data) + data


def _unpack(value: bytes, kind: type[Stored], what: str) -> Stored:
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
    """Return four bytes over the message's kind and its bytes, since bytes cut short or of another kind may parse."""
    return zlib.crc32(data, zlib.crc32(kind.DESCRIPTOR.full_name.encode())).to_bytes(4, "big")


def _is_whole(tensor: pb.Tensor) -> bool:
    item_bytes = ITEM_BYTES.get(tensor.dtype)
    return item_bytes is not None and len(tensor.data) == item_bytes * math.prod(tensor.shape)
