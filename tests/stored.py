"""Records of sessions, without a gateway."""

from avatar.store.sessions import SessionStore
from avatar.worker.v1 import types_pb2 as pb


async def write_position(store: SessionStore, session_id: str, position: pb.Position) -> None:
    """Write a session's position, as a stream at some gateway does."""
    claim = store.claim(session_id)
    await claim.acquire()
    await claim.renew(position)
    await claim.release()
