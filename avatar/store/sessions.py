"""Where sessions are kept: constants, numbered conditions and position, in Redis or in memory, under a time to live.

Values are the messages of avatar/worker/v1/types.proto with a version byte and a checksum in front: numbers raw, with
dtype and shape. What is damaged or foreign, or whose numbers do not fill their shape, is refused; nothing is ever
unpickled.

    avatar:session:{ID}    hash   session, position, conditions/0, conditions/1, ...
    avatar:stream:{ID}     string owner of the one stream that may be open
    avatar:reference:{ID}  hash   reference
    avatar:text:{ID}       hash   embedding; named by prompt and encoder, for whoever embeds the same again
"""

import math
import zlib
from collections.abc import Sequence
from typing import TypeVar

from google.protobuf.message import Message

from avatar.errors import ReferenceNotFound, SessionBusy, SessionNotFound, StateCorrupt
from avatar.store.redis import Claim, Hashes, Hold
from avatar.worker.v1 import types_pb2 as pb
from avatar.worker.v1.text_pb2 import EmbedResponse

Kept = TypeVar("Kept", bound=Message)
VERSION = b"\x01"
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1}
# A stream's owner renews its claim about three times in this many seconds; a gateway that dies frees its sessions then.
CLAIM_TTL_S = 10.0


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
