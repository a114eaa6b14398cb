"""Quotas: requests over a tenant's limits of sessions, references and audio are refused until it has room again."""

from __future__ import annotations

import pytest

from avatar.v1 import avatar_service_pb2 as pb
from tests.conftest import speech
from tests.contract.test_references import picture_file
from tests.product import Stub, new_reference, new_session, open_stream, speak
from tests.refusals import refused


@pytest.mark.parametrize("quotas", ["max_sessions = 2"])
async def test_sessions_over_the_quota_are_refused_until_one_ends(acme: Stub, globex: Stub, portrait: bytes) -> None:
    first, second = [await new_session(acme, portrait) for _ in range(2)]
    async with refused("QUOTA_EXCEEDED") as refusal:
        await new_session(acme, portrait)
    assert refusal.metadata == {"quota": "sessions"}
    assert refusal.retry_s
    assert await new_session(globex, portrait)
    await speak(acme, first.id, speech(0.5))
    third = await new_session(acme, portrait)
    await acme.DeleteSession(pb.DeleteSessionRequest(session_id=second.id), timeout=10)
    await new_session(acme, portrait)
    async with refused("QUOTA_EXCEEDED"):
        await new_session(acme, portrait)
    await speak(acme, third.id, speech(0.5))


@pytest.mark.parametrize("quotas", ["max_references = 1"])
async def test_references_over_the_quota_are_refused_until_one_is_deleted(
    acme: Stub, globex: Stub, portrait: bytes
) -> None:
    other = picture_file(64, 64)
    reference = await new_reference(acme, portrait)
    assert (await new_reference(acme, portrait)).id == reference.id
    async with refused("QUOTA_EXCEEDED") as refusal:
        await new_reference(acme, other)
    assert refusal.metadata == {"quota": "references"}
    assert not refusal.retry_s
    assert await new_reference(globex, other)
    await acme.DeleteReference(pb.DeleteReferenceRequest(reference_id=reference.id), timeout=10)
    assert await new_reference(acme, other)


@pytest.mark.parametrize("quotas", ["max_audio_s = 2"])
async def test_audio_over_the_days_quota_is_refused(acme: Stub, globex: Stub, portrait: bytes) -> None:
    await speak(acme, (await new_session(acme, portrait)).id, speech(1.5))
    session = await new_session(acme, portrait)
    async with refused("QUOTA_EXCEEDED") as refusal:
        await speak(acme, session.id, speech(1.5))
    assert refusal.metadata == {"quota": "audio"}
    session = await new_session(acme, portrait)
    async with refused("QUOTA_EXCEEDED") as refusal:
        await open_stream(acme, session.id)
    assert 0 < refusal.retry_s <= 86400, "until the day ends"
    await speak(globex, (await new_session(globex, portrait)).id, speech(0.5))
