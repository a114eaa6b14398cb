"""Sessions: their options and defaults, their changes, and the requests that are refused."""

from __future__ import annotations

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask

from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import types_pb2 as types
from tests.blocks import BLOCK_FRAMES
from tests.product import Stub, new_session
from tests.refusals import refused


async def update(stub: Stub, session: types.Session, *paths: str) -> types.Session:
    request = pb.UpdateSessionRequest(session=session, update_mask=FieldMask(paths=paths))
    return (await stub.UpdateSession(request, timeout=10)).session


async def test_capabilities_describe_the_deployment(capabilities: pb.GetCapabilitiesResponse) -> None:
    video = capabilities.video
    assert video.frame_rate_hz == 25
    assert (video.width > 0 and video.height > 0) or capabilities.sizes_free
    assert (capabilities.min_rate_hz, capabilities.max_rate_hz) == (8000, 48000)
    assert capabilities.block_frames == BLOCK_FRAMES
    assert capabilities.num_levels > 0
    assert min(capabilities.max_picture_bytes, capabilities.max_audio_bytes, capabilities.max_audio_ahead_s) > 0
    assert min(capabilities.max_live_ahead_s, capabilities.max_unread_s) > 0
    block_s = capabilities.block_frames / video.frame_rate_hz
    assert capabilities.sustained_rate > 1
    assert capabilities.reaction_s > block_s
    assert capabilities.reaction_s > capabilities.reaction_ahead_s == capabilities.hold_s > 0


async def test_a_session_has_the_requested_options_and_no_others(stub: Stub, portrait: bytes) -> None:
    chosen = {"sink_update_block": 0, "min_sink_distance": 4, "max_sink_distance": 4}
    session = await new_session(stub, portrait, seed=12345, ttl=Duration(seconds=77), **chosen)
    assert (session.seed, session.ttl.seconds) == (12345, 77)
    assert session.state == types.Session.STATE_IDLE
    assert session.next_frame == 3
    assert session.video.frame_rate_hz == 25
    assert {name: getattr(session, name) for name in chosen} == chosen
    assert session.HasField("sink_update_block")
    assert not session.HasField("audio_context")
    kept = (await stub.GetSession(pb.GetSessionRequest(session_id=session.id), timeout=10)).session
    assert (kept.id, kept.seed, kept.reference_id) == (session.id, session.seed, session.reference_id)


async def test_ids_and_seeds_are_random_by_default(stub: Stub, portrait: bytes) -> None:
    sessions = [await new_session(stub, portrait) for _ in range(3)]
    assert len({session.id for session in sessions}) == 3
    assert len({session.seed for session in sessions}) == 3
    assert min(len(session.id) for session in sessions) >= 32
    assert not sessions[0].HasField("sink_update_block")
    assert not sessions[0].HasField("min_sink_distance")


@pytest.mark.parametrize("session_id", ["", "nobody", "../../x"])
async def test_an_unknown_session_is_not_found(stub: Stub, session_id: str) -> None:
    async with refused("SESSION_NOT_FOUND"):
        await stub.GetSession(pb.GetSessionRequest(session_id=session_id), timeout=10)
    async with refused("SESSION_NOT_FOUND"):
        await stub.Interrupt(pb.InterruptRequest(session_id=session_id), timeout=10)
    async with refused("SESSION_NOT_FOUND"):
        await stub.DeleteSession(pb.DeleteSessionRequest(session_id=session_id), timeout=10)


async def test_a_prompt_is_refused_without_a_text_encoder(
    stub: Stub, portrait: bytes, capabilities: pb.GetCapabilitiesResponse
) -> None:
    if capabilities.prompts:
        return
    async with refused("PROMPT_UNSUPPORTED"):
        await new_session(stub, portrait, prompt="a person who smiles")
    session = await new_session(stub, portrait)
    session.prompt = "a person who smiles"
    async with refused("PROMPT_UNSUPPORTED"):
        await update(stub, session, "prompt")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"seed": 1 << 63}, "seed"),
        ({"ttl": Duration(nanos=1)}, "ttl"),
        ({"ttl": Duration(seconds=1 << 40)}, "ttl"),
        ({"ttl": Duration(seconds=1, nanos=2_000_000_000)}, "ttl"),
        ({"min_sink_distance": 4}, "min_sink_distance"),
        ({"min_sink_distance": 5, "max_sink_distance": 4}, "min_sink_distance"),
        ({"audio_context": Duration(nanos=30_000_000)}, "audio_context"),
        ({"audio_context": Duration(seconds=-1)}, "audio_context"),
        ({"audio_context": Duration(seconds=60)}, "audio_context"),
    ],
    ids=["seed", "short ttl", "long ttl", "no duration", "half a range", "no range", "odd", "negative", "far"],
)
async def test_an_option_out_of_range_is_refused_with_its_field(
    stub: Stub, portrait: bytes, fields: dict[str, object], field: str
) -> None:
    async with refused("INVALID_FIELD") as refusal:
        await new_session(stub, portrait, **fields)
    assert refusal.fields == [field]


async def test_a_session_can_be_given_another_time_to_live_but_no_other_seed(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    session.ttl.FromSeconds(55)
    assert (await update(stub, session, "ttl")).ttl.seconds == 55
    async with refused("INVALID_FIELD") as refusal:
        await update(stub, session, "seed")
    assert refusal.fields == ["update_mask"]


async def test_a_deleted_session_is_not_found(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    await stub.DeleteSession(pb.DeleteSessionRequest(session_id=session.id), timeout=10)
    async with refused("SESSION_NOT_FOUND"):
        await stub.GetSession(pb.GetSessionRequest(session_id=session.id), timeout=10)


async def test_an_interrupt_without_a_stream_is_refused(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    async with refused("NOT_STREAMING"):
        await stub.Interrupt(pb.InterruptRequest(session_id=session.id), timeout=10)
