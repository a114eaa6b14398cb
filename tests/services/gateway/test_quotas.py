"""Tests of services.gateway.access.quotas: shared counters, gateways that die, and a store that is unreachable."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from avatar.errors import QuotaExceeded, StoreUnavailable
from avatar.store.claims import CLOSED_TTL_S, Claim
from avatar.store.redis import RedisHashes
from avatar.store.usage import TenantUsage
from avatar.v1 import avatar_service_pb2 as pb
from services.gateway.access import quotas as module
from services.gateway.access import tenants
from services.gateway.access.quotas import MARGIN_S, Quotas, open_quotas
from services.gateway.access.tenants import Tenant
from tests.conftest import UnreliableHashes
from tests.store.expiry import elapse

ACME = Tenant("acme", max_sessions=1, max_audio_s=10.0, max_references=1)
GLOBEX = Tenant("globex", max_sessions=1, max_audio_s=10.0)
BYTES_PER_S = 100
HEARD_BYTES_PER_S = 50


@pytest.fixture
def usage(unreliable: UnreliableHashes) -> TenantUsage:
    return TenantUsage(unreliable)


@contextmanager
def calling(tenant: Tenant) -> Iterator[None]:
    """Handle a call of the tenant while the body runs."""
    token = tenants._CALLER.set(tenant)
    yield
    tenants._CALLER.reset(token)


async def send_audio(quotas: Quotas, seconds: int) -> None:
    """Meter a stream of pieces of one second each."""

    async def pieces() -> AsyncIterator[pb.StreamAvatarRequest]:
        for _ in range(seconds):
            yield pb.StreamAvatarRequest(audio=pb.AudioPiece(data=bytes(BYTES_PER_S)))
        yield pb.StreamAvatarRequest(close=pb.CloseAvatar())

    assert [request async for request in quotas.metered(pieces(), BYTES_PER_S, HEARD_BYTES_PER_S)]


def claim(hashes: RedisHashes, session_id: str = "a", ttl_s: float = 60.0) -> Claim:
    """A claim on a session with this time to live."""
    claim = Claim(hashes, session_id)
    claim.ttl_s = ttl_s
    return claim


async def has_room(quotas: Quotas) -> bool:
    """Return whether the caller may have another session."""
    try:
        await quotas.lease_session("b", 60.0)
    except QuotaExceeded:
        return False
    await quotas.release_session("b")
    return True


async def test_a_stream_and_its_session_count_once(usage: TenantUsage, hashes: RedisHashes) -> None:
    quotas, elsewhere = Quotas(usage), Quotas(usage)
    with calling(ACME):
        await quotas.lease_session("a", 60.0)
        async with quotas.streaming(claim(hashes)):
            assert not await has_room(elsewhere)
            with calling(GLOBEX):
                await elsewhere.lease_session("c", 60.0)


@pytest.mark.parametrize(
    ("ending", "counts_s"), [("gone", 0.0), ("closed", CLOSED_TTL_S), ("elsewhere", 60.0), ("refused", 60.0)]
)
async def test_a_session_counts_as_long_as_its_record(
    usage: TenantUsage, hashes: RedisHashes, redis_client: Redis, ending: str, counts_s: float
) -> None:
    quotas, held = Quotas(usage), claim(hashes)
    with calling(ACME):
        await quotas.lease_session("a", 60.0)
        async with quotas.streaming(held):
            if ending == "gone":
                held.ttl_s = 0.0
            held.is_closed = ending == "closed"
        if counts_s:
            await elapse(redis_client, counts_s - 1)
            assert not await has_room(quotas)
            await elapse(redis_client, 1 + MARGIN_S)
        assert await has_room(quotas)


async def test_opening_a_session_again_and_again_does_not_prolong_its_lease(
    usage: TenantUsage, hashes: RedisHashes, redis_client: Redis
) -> None:
    quotas = Quotas(usage)
    with calling(ACME):
        await quotas.lease_session("a", 60.0)
        for _ in range(3):
            await elapse(redis_client, 20)
            async with quotas.streaming(claim(hashes)):
                pass
        await elapse(redis_client, MARGIN_S)
        assert await has_room(quotas)


async def test_two_streams_of_a_session_at_once_end_one_by_one(usage: TenantUsage, hashes: RedisHashes) -> None:
    quotas, first, second = Quotas(usage), claim(hashes), claim(hashes)
    with calling(ACME):
        async with AsyncExitStack() as outer:
            await outer.enter_async_context(quotas.streaming(first))
            async with quotas.streaming(second):
                assert not await has_room(quotas)
            await quotas.save()
            assert not await has_room(quotas)
            first.ttl_s = 0.0
        assert await has_room(quotas)


async def test_a_lease_released_during_its_renewal_stays_released(usage: TenantUsage, hashes: RedisHashes) -> None:
    quotas, held = Quotas(usage), claim(hashes)
    with calling(ACME):
        async with quotas.streaming(held):
            saving = asyncio.ensure_future(quotas.save())
            await asyncio.sleep(0)
            held.ttl_s = 0.0
        await saving
        assert await has_room(quotas)


async def test_leases_of_a_dead_gateway_expire_with_its_records(
    usage: TenantUsage, hashes: RedisHashes, redis_client: Redis
) -> None:
    dying, living = Quotas(usage), Quotas(usage)
    with calling(ACME):
        async with AsyncExitStack() as never_closed:
            await never_closed.enter_async_context(dying.streaming(claim(hashes)))
            for _ in range(10):
                await elapse(redis_client, 59)
                await dying.save()
                assert not await has_room(living)
            await elapse(redis_client, 61 + MARGIN_S)
            await living.lease_session("b", 60.0)
            await dying.save()  # it was only slow: its stream is not ended


async def test_a_session_without_a_stream_counts_until_it_expires(usage: TenantUsage, redis_client: Redis) -> None:
    quotas = Quotas(usage)
    with calling(ACME):
        await quotas.lease_session("a", 60.0)
        await quotas.lease_session("a", 90.0)
        await elapse(redis_client, 61)
        with pytest.raises(QuotaExceeded):
            await quotas.lease_session("b", 60.0)
        await elapse(redis_client, 30 + MARGIN_S)
        await quotas.lease_session("b", 60.0)


async def audio_used(usage: TenantUsage) -> float:
    return await usage.add(f"acme/audio/{module._today()}", 0.0, 60.0)


async def test_audio_is_counted_over_all_gateways(usage: TenantUsage, hashes: RedisHashes) -> None:
    here, there = Quotas(usage), Quotas(usage)
    with calling(ACME):
        await send_audio(here, 6)
        await send_audio(there, 4)
        for quotas in (here, there):
            with pytest.raises(QuotaExceeded) as caught:
                async with quotas.streaming(claim(hashes)):
                    pass
            assert caught.value.metadata == {"quota": "audio"}
            assert caught.value.retry_s
            assert 0 < caught.value.retry_s <= 86400
    with calling(GLOBEX):
        await send_audio(here, 9)


async def test_gateways_at_once_pass_the_quota_by_less_than_one_piece(usage: TenantUsage) -> None:
    gateways = [Quotas(usage) for _ in range(3)]
    num_accepted = 0

    async def send(quotas: Quotas) -> None:
        nonlocal num_accepted

        async def pieces() -> AsyncIterator[pb.StreamAvatarRequest]:
            while True:
                yield pb.StreamAvatarRequest(audio=pb.AudioPiece(data=bytes(70)))

        try:
            async for _ in quotas.metered(pieces(), BYTES_PER_S, HEARD_BYTES_PER_S):
                num_accepted += 1
        except QuotaExceeded:
            return

    with calling(ACME):
        await asyncio.gather(*(send(quotas) for quotas in gateways * 3))
    assert 10.0 - 0.7 * len(gateways) <= 0.7 * num_accepted < 10.0 + 0.7


async def test_audio_that_the_avatar_listens_to_counts(usage: TenantUsage) -> None:
    async def pieces() -> AsyncIterator[pb.StreamAvatarRequest]:
        for _ in range(11):
            yield pb.StreamAvatarRequest(listen=pb.HeardAudio(data=bytes(HEARD_BYTES_PER_S)))

    metered = Quotas(usage).metered(pieces(), BYTES_PER_S, HEARD_BYTES_PER_S)
    with calling(ACME):
        for _ in range(10):
            await anext(metered)
        with pytest.raises(QuotaExceeded):
            await anext(metered)


async def test_audio_that_is_reserved_and_not_used_is_returned(usage: TenantUsage, hashes: RedisHashes) -> None:
    quotas = Quotas(usage)
    with calling(ACME):
        async with quotas.streaming(claim(hashes)):
            assert await audio_used(usage) == module.AHEAD_S
        assert await audio_used(usage) == 0.0


async def test_a_stream_ends_when_the_days_audio_is_used_up(usage: TenantUsage) -> None:
    quotas = Quotas(usage)
    with calling(ACME):
        await send_audio(quotas, 10)
        with pytest.raises(QuotaExceeded):
            await send_audio(quotas, 1)


async def test_the_audio_quota_is_restored_the_next_day(usage: TenantUsage, monkeypatch: pytest.MonkeyPatch) -> None:
    quotas, today = Quotas(usage), 20_000 * 86400.0
    with calling(ACME):
        monkeypatch.setattr(time, "time", lambda: today + 86399)
        await send_audio(quotas, 10)
        await quotas.save()
        with pytest.raises(QuotaExceeded) as caught:
            await send_audio(quotas, 1)
        assert caught.value.retry_s == pytest.approx(1.0)
        monkeypatch.setattr(time, "time", lambda: today + 86400)
        await send_audio(quotas, 10)


async def test_streams_continue_while_the_store_is_lost(
    unreliable: UnreliableHashes, usage: TenantUsage, hashes: RedisHashes
) -> None:
    quotas = Quotas(usage)
    with calling(ACME):
        async with quotas.streaming(claim(hashes)):
            unreliable.is_lost = True
            with pytest.raises(StoreUnavailable):
                await quotas.save()
            await send_audio(quotas, 4)
            with pytest.raises(StoreUnavailable):
                await quotas.save()
        with pytest.raises(StoreUnavailable):
            await quotas.lease_session("b", 60.0)
        with pytest.raises(StoreUnavailable):
            async with Quotas(usage).streaming(claim(hashes, "b")):
                pass
        unreliable.is_lost = False
        await quotas.save()
        assert await audio_used(usage) == 4.0
        await send_audio(quotas, 6)
        with pytest.raises(QuotaExceeded):
            await send_audio(quotas, 1)


async def test_concurrent_saves_add_audio_once(usage: TenantUsage) -> None:
    quotas = Quotas(usage)
    with calling(ACME):
        await send_audio(quotas, 3)
        await asyncio.gather(*(quotas.save() for _ in range(5)))
        assert await audio_used(usage) == 3.0


async def test_audio_is_settled_on_exit(unreliable: UnreliableHashes, usage: TenantUsage) -> None:
    with calling(ACME):
        async with open_quotas(usage) as quotas:
            unreliable.is_lost = True
            await send_audio(quotas, 3)
            unreliable.is_lost = False
    assert await audio_used(usage) == 3.0


async def test_audio_is_settled_in_the_background_once_the_store_is_back(
    unreliable: UnreliableHashes, usage: TenantUsage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAVE_S", 0.01)
    with calling(ACME):
        async with open_quotas(usage) as quotas:
            unreliable.is_lost = True
            await send_audio(quotas, 3)
            unreliable.is_lost = False
            async with asyncio.timeout(5):
                while not await audio_used(usage):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)


async def test_a_reservation_that_fails_takes_no_place_of_a_reference(usage: TenantUsage) -> None:
    """Not even if the same picture is stored by another call meanwhile."""
    quotas = Quotas(usage)
    with calling(replace(ACME, max_references=3)):
        for name in ("a", "b"):
            with suppress(ValueError):
                async with quotas.reference(name):
                    async with quotas.reference(name) as other:
                        await quotas.lease_reference(name, 60.0, other)
                    raise ValueError("the picture cannot be encoded")
        async with quotas.reference("c"):
            with pytest.raises(QuotaExceeded):
                await quotas.lease_reference("d", 60.0)
        async with quotas.reference("a") as reservation:
            assert not reservation
        assert await usage.names("acme/references") == ["a", "b"]


async def test_without_tenants_the_store_is_not_used(
    unreliable: UnreliableHashes, usage: TenantUsage, hashes: RedisHashes
) -> None:
    unreliable.is_lost = True
    quotas = Quotas(usage)
    async with quotas.reference("r") as reservation:
        await quotas.lease_reference("r", 60.0, reservation)
    await quotas.release_reference("r")
    await quotas.lease_session("a", 60.0)
    async with quotas.streaming(claim(hashes)):
        await quotas.save()
    await quotas.release_session("a")


async def test_an_unforeseen_error_does_not_end_the_saving(
    usage: TenantUsage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saved, num_calls = asyncio.Event(), 0

    async def save(_: Quotas) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 1:
            raise KeyError("own")
        saved.set()

    monkeypatch.setattr(module, "SAVE_S", 0.0)
    monkeypatch.setattr(Quotas, "save", save)
    async with open_quotas(usage), asyncio.timeout(30):
        await saved.wait()
    assert [each.message for each in caplog.records if each.levelname == "ERROR"] == ["usage not saved"]
