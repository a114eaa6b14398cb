"""Quotas: what a tenant may have at a time or in a day, and that it is refused beyond."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from grpc import StatusCode

from avatar.store.sessions import SessionStore
from avatar.v1 import avatar_service_pb2 as pb
from tests.conftest import speech
from tests.contract.refusals import refused
from tests.contract.tenants import ACME, tenanted
from tests.contract.test_references import picture_file
from tests.product import Stub, new_session, opening, speak, stream


@pytest.mark.parametrize("quotas", ["max_sessions = 2"])
async def test_sessions_are_as_many_as_a_tenant_may_have(acme: Stub, globex: Stub, portrait: bytes) -> None:
    first, second = [await new_session(acme, portrait) for _ in range(2)]
    async with refused(StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED") as refusal:
        await new_session(acme, portrait)
    assert refusal.metadata == {"quota": "sessions"}
    assert refusal.retries
    assert await new_session(globex, portrait)
    await speak(acme, first.id, speech(0.5))
    third = await new_session(acme, portrait)
    await acme.DeleteSession(pb.DeleteSessionRequest(session_id=second.id), timeout=10)
    await new_session(acme, portrait)
    async with refused(StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED"):
        await new_session(acme, portrait)
    await speak(acme, third.id, speech(0.5))


async def test_quotas_hold_over_gateways(
    checkpoint: Path, store: SessionStore, tmp_path: Path, redis: str, portrait: bytes
) -> None:
    async with AsyncExitStack() as stack:
        stubs = []
        for folder in (tmp_path / "one", tmp_path / "two"):
            folder.mkdir()
            gateway = await stack.enter_async_context(tenanted(checkpoint, folder, "max_sessions = 1", store, redis))
            stubs.append(await stack.enter_async_context(gateway.called(ACME)))
        one, two = stubs
        session = await new_session(one, portrait)
        async with refused(StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED"):
            await new_session(two, portrait)
        assert len((await speak(two, session.id, speech(0.5))).frames) == 21
        last = await new_session(one, portrait)
        await two.DeleteSession(pb.DeleteSessionRequest(session_id=last.id), timeout=10)


@pytest.mark.parametrize("quotas", ["max_references = 1"])
async def test_references_are_as_many_as_a_tenant_may_keep(acme: Stub, globex: Stub, portrait: bytes) -> None:
    mine, other = pb.CreateReferenceRequest(picture=portrait), pb.CreateReferenceRequest(picture=picture_file(64, 64))
    reference = (await acme.CreateReference(mine, timeout=60)).reference
    assert (await acme.CreateReference(mine, timeout=60)).reference.id == reference.id
    async with refused(StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED") as refusal:
        await acme.CreateReference(other, timeout=60)
    assert refusal.metadata == {"quota": "references"}
    assert not refusal.retries
    assert await globex.CreateReference(other, timeout=60)
    await acme.DeleteReference(pb.DeleteReferenceRequest(reference_id=reference.id), timeout=10)
    assert await acme.CreateReference(other, timeout=60)


@pytest.mark.parametrize("quotas", ["max_audio_s = 2"])
async def test_sound_is_as_much_as_a_tenant_may_send(acme: Stub, globex: Stub, portrait: bytes) -> None:
    await speak(acme, (await new_session(acme, portrait)).id, speech(1.5))
    session = await new_session(acme, portrait)
    async with refused(StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED") as refusal:
        await speak(acme, session.id, speech(1.5))
    assert refusal.metadata == {"quota": "audio"}
    session = await new_session(acme, portrait)
    async with refused(StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED") as refusal:
        await stream(acme, [opening(session.id)])
    assert 0 < refusal.retry_s <= 86400, "the day ends"
    await speak(globex, (await new_session(globex, portrait)).id, speech(0.5))
