"""Sessions in a store without a gateway."""

from avatar.store.sessions import SessionStore
from avatar.worker.v1 import types_pb2 as pb


async def store_session(
    store: SessionStore, session: pb.Session, conditions: pb.Conditions, position: pb.Position
) -> None:
    """Create a session whose motion latents, and the sink of its conditions, become those of a reference of its own."""
    reference = pb.Reference(id=session.reference_id or session.id, motion=session.motion, sink=conditions.sink)
    await store.references.put(reference, position.ttl_s)
    stored = pb.Session()
    stored.CopyFrom(session)
    stored.ClearField("motion")
    stored.reference_id = reference.id
    await store.create(stored, conditions, position)


async def write_position(store: SessionStore, session_id: str, position: pb.Position) -> None:
    """Write a session's position, as a stream at some gateway does."""
    claim = store.claim(session_id)
    await claim.acquire()
    await claim.renew(position)
    await claim.release()
