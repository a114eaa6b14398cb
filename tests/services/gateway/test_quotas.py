"""Tests of services.gateway.access.quotas: shared counters, gateways that die, and a store that is unreachable."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager

import pytest
from redis.asyncio import Redis

from avatar.errors import QuotaExceeded, StoreUnavailable
from avatar.store.sessions import LOCK_TTL_S
from avatar.store.usage import TenantUsage
from avatar.v1 import avatar_service_pb2 as pb
from services.gateway.access import quotas as module
from services.gateway.access import tenants
from services.gateway.access.quotas import Quotas, open_quotas
from services.gateway.access.tenants import Tenant
from tests.store.expiry import elapse

ACME = Tenant("acme", max_sessions=1, max_audio_s=10.0, max_references=1)
GLOBEX = Tenant("globex", max_sessions=1, max_audio_s=10.0)
BYTES_PER_S = 100


class Usage(TenantUsage):
    """Usage in a Redis server that is unreachable while `is_lost`."""

    is_lost = False

    def _call(self) -> AbstractAsyncContextManager[None]:
        if self.is_lost:
            raise StoreUnavailable("lost", retry_s=1.0)
        return super()._call()


@pytest.fixture
async def usage(redis: str) -> AsyncGenerator[Usage, None]:
    usage = Usage(redis)
    yield usage
    await usage.aclose()


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

    assert [request async for request in quotas.metered(pieces(), BYTES_PER_S)]


async def test_a_stream_counts_as_one_session_until_it_ends(usage: Usage) -> None:
    quotas, elsewhere = Quotas(usage), Quotas(usage)
    with calling(ACME):
        await quotas.lease_session("a", 60.0)
        async with quotas.streaming("a"):
            with pytest.raises(QuotaExceeded):
                await elsewhere.lease_session("b", 60.0)
            with calling(GLOBEX):
                await elsewhere.lease_session("c", 60.0)
        await quotas.save()
        await elsewhere.lease_session("b", 60.0)


async def test_a_lease_released_during_its_renewal_stays_released(usage: Usage) -> None:
    quotas = Quotas(usage)
    with calling(ACME):
        async with quotas.streaming("a"):
            saving = asyncio.ensure_future(quotas.save())
            await asyncio.sleep(0)
        await saving
        await quotas.lease_session("b", 60.0)


async def test_leases_of_a_dead_gateway_expire(usage: Usage, redis_client: Redis) -> None:
    dying, living = Quotas(usage), Quotas(usage)
    with calling(ACME):
        async with AsyncExitStack() as never_closed:
            await never_closed.enter_async_context(dying.streaming("a"))
            for _ in range(10):
                await elapse(redis_client, LOCK_TTL_S / 3)
                await dying.save()
                with pytest.raises(QuotaExceeded):
                    await living.lease_session("b", 60.0)
            await elapse(redis_client, LOCK_TTL_S + 0.1)
            await living.lease_session("b", 60.0)
            await dying.save()  # it was only slow: its stream is not ended


async def test_a_session_without_a_stream_counts_until_it_expires(usage: Usage, redis_client: Redis) -> None:
    quotas = Quotas(usage)
    with calling(ACME):
        await quotas.lease_session("a", 60.0)
        await quotas.lease_session("a", 90.0)
        await elapse(redis_client, 61)
        with pytest.raises(QuotaExceeded):
            await quotas.lease_session("b", 60.0)
        await elapse(redis_client, 30)
        await quotas.lease_session("b", 60.0)


async def test_audio_is_counted_over_all_gateways(usage: Usage) -> None:
    here, there = Quotas(usage), Quotas(usage)
    with calling(ACME):
        await send_audio(here, 6)
        await send_audio(there, 4)
        await here.save()
        await there.save()
        for quotas in (here, there):
            with pytest.raises(QuotaExceeded) as caught:
                async with quotas.streaming("a"):
                    pass
            assert caught.value.metadata == {"quota": "audio"}
            assert caught.value.retry_s
            assert 0 < caught.value.retry_s <= 86400
    with calling(GLOBEX):
        await send_audio(here, 9)


async def test_a_stream_ends_when_the_days_audio_is_used_up(usage: Usage) -> None:
    quotas = Quotas(usage)
    with calling(ACME):
        await send_audio(quotas, 10)
        with pytest.raises(QuotaExceeded):
            await send_audio(quotas, 1)


async def test_the_audio_quota_is_restored_the_next_day(usage: Usage, monkeypatch: pytest.MonkeyPatch) -> None:
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


async def test_streams_continue_while_the_store_is_lost(usage: Usage) -> None:
    quotas = Quotas(usage)
    with calling(ACME):
        async with quotas.streaming("a"):
            usage.is_lost = True
            with pytest.raises(StoreUnavailable):
                await quotas.save()
            await send_audio(quotas, 4)
            with pytest.raises(StoreUnavailable):
                await quotas.save()
        with pytest.raises(StoreUnavailable):
            await quotas.lease_session("b", 60.0)
        with pytest.raises(StoreUnavailable):
            async with quotas.streaming("b"):
                pass
        usage.is_lost = False
        await quotas.save()
        assert await usage.add(f"acme/audio/{module._today()}", 0.0, 1.0) == 4.0


async def test_concurrent_saves_add_audio_once(usage: Usage) -> None:
    quotas = Quotas(usage)
    with calling(ACME):
        await send_audio(quotas, 3)
        await asyncio.gather(*(quotas.save() for _ in range(5)))
        assert await usage.add(f"acme/audio/{module._today()}", 0.0, 1.0) == 3.0


async def test_unsaved_audio_is_saved_on_exit(usage: Usage) -> None:
    with calling(ACME):
        async with open_quotas(usage) as quotas:
            await send_audio(quotas, 3)
    assert await usage.add(f"acme/audio/{module._today()}", 0.0, 1.0) == 3.0


async def test_audio_is_saved_in_the_background_once_the_store_is_back(
    usage: Usage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAVE_S", 0.01)
    with calling(ACME):
        async with open_quotas(usage) as quotas:
            await send_audio(quotas, 3)
            usage.is_lost = True
            await asyncio.sleep(0.05)
            usage.is_lost = False
            async with asyncio.timeout(5):
                while not await usage.add(f"acme/audio/{module._today()}", 0.0, 1.0):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)


async def test_without_tenants_the_store_is_not_used(usage: Usage) -> None:
    usage.is_lost = True
    quotas = Quotas(usage)
    await quotas.lease_reference("r", 60.0)
    await quotas.release_reference("r")
    await quotas.lease_session("a", 60.0)
    async with quotas.streaming("a"):
        await quotas.save()
    await quotas.release_session("a")
