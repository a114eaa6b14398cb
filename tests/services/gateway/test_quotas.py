"""Tests of services.gateway.access.quotas: gateways that count together, die, and lose their store."""

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
    """Usage in a Redis server that is unreachable while `is_away`."""

    is_away = False

    def _call(self) -> AbstractAsyncContextManager[None]:
        if self.is_away:
            raise StoreUnavailable("away", retry_s=1.0)
        return super()._call()


@pytest.fixture
async def usage(redis: str) -> AsyncGenerator[Usage, None]:
    usage = Usage(redis)
    yield usage
    await usage.aclose()


@contextmanager
def calling(tenant: Tenant) -> Iterator[None]:
    """It is this tenant whose call is handled."""
    token = tenants._CALLER.set(tenant)
    yield
    tenants._CALLER.reset(token)


async def hear(quotas: Quotas, seconds: int) -> None:
    """A stream that sends so many pieces of a second."""

    async def pieces() -> AsyncIterator[pb.StreamAvatarRequest]:
        for _ in range(seconds):
            yield pb.StreamAvatarRequest(audio=pb.AudioPiece(data=bytes(BYTES_PER_S)))
        yield pb.StreamAvatarRequest(close=pb.CloseAvatar())

    assert [request async for request in quotas.metered(pieces(), BYTES_PER_S)]


async def test_a_stream_takes_one_place_until_it_ends(usage: Usage) -> None:
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


async def test_a_place_that_is_let_go_meanwhile_is_not_held_again(usage: Usage) -> None:
    quotas = Quotas(usage)
    with calling(ACME):
        async with quotas.streaming("a"):
            saving = asyncio.ensure_future(quotas.save())
            await asyncio.sleep(0)
        await saving
        await quotas.lease_session("b", 60.0)


async def test_the_place_of_a_gateway_that_died_is_free_after_its_lease(usage: Usage, redis_client: Redis) -> None:
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
            await dying.save()  # it was only slow: what runs is not ended


async def test_a_session_that_nobody_streams_is_free_once_it_is_forgotten(usage: Usage, redis_client: Redis) -> None:
    quotas = Quotas(usage)
    with calling(ACME):
        await quotas.lease_session("a", 60.0)
        await quotas.lease_session("a", 90.0)
        await elapse(redis_client, 61)
        with pytest.raises(QuotaExceeded):
            await quotas.lease_session("b", 60.0)
        await elapse(redis_client, 30)
        await quotas.lease_session("b", 60.0)


async def test_sound_is_counted_over_all_gateways(usage: Usage) -> None:
    here, there = Quotas(usage), Quotas(usage)
    with calling(ACME):
        await hear(here, 6)
        await hear(there, 4)
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
        await hear(here, 9)


async def test_a_stream_ends_with_the_days_sound(usage: Usage) -> None:
    quotas = Quotas(usage)
    with calling(ACME):
        await hear(quotas, 10)
        with pytest.raises(QuotaExceeded):
            await hear(quotas, 1)


async def test_the_next_day_begins_anew(usage: Usage, monkeypatch: pytest.MonkeyPatch) -> None:
    quotas, today = Quotas(usage), 20_000 * 86400.0
    with calling(ACME):
        monkeypatch.setattr(time, "time", lambda: today + 86399)
        await hear(quotas, 10)
        await quotas.save()
        with pytest.raises(QuotaExceeded) as caught:
            await hear(quotas, 1)
        assert caught.value.retry_s == pytest.approx(1.0)
        monkeypatch.setattr(time, "time", lambda: today + 86400)
        await hear(quotas, 10)


async def test_a_store_that_is_away_hurts_nobody_who_streams(usage: Usage) -> None:
    quotas = Quotas(usage)
    with calling(ACME):
        async with quotas.streaming("a"):
            usage.is_away = True
            with pytest.raises(StoreUnavailable):
                await quotas.save()
            await hear(quotas, 4)
            with pytest.raises(StoreUnavailable):
                await quotas.save()
        with pytest.raises(StoreUnavailable):
            await quotas.lease_session("b", 60.0)
        with pytest.raises(StoreUnavailable):
            async with quotas.streaming("b"):
                pass
        usage.is_away = False
        await quotas.save()
        assert await usage.add(f"acme/audio/{module._today()}", 0.0, 1.0) == 4.0


async def test_sound_is_added_once_however_many_add_it(usage: Usage) -> None:
    quotas = Quotas(usage)
    with calling(ACME):
        await hear(quotas, 3)
        await asyncio.gather(*(quotas.save() for _ in range(5)))
        assert await usage.add(f"acme/audio/{module._today()}", 0.0, 1.0) == 3.0


async def test_what_was_heard_last_is_saved_at_the_end(usage: Usage) -> None:
    with calling(ACME):
        async with open_quotas(usage) as quotas:
            await hear(quotas, 3)
    assert await usage.add(f"acme/audio/{module._today()}", 0.0, 1.0) == 3.0


async def test_counting_goes_on_while_nobody_calls(usage: Usage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAVE_S", 0.01)
    with calling(ACME):
        async with open_quotas(usage) as quotas:
            await hear(quotas, 3)
            usage.is_away = True
            await asyncio.sleep(0.05)
            usage.is_away = False
            async with asyncio.timeout(5):
                while not await usage.add(f"acme/audio/{module._today()}", 0.0, 1.0):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)


async def test_where_there_are_no_tenants_nothing_is_asked_of_the_store(usage: Usage) -> None:
    usage.is_away = True
    quotas = Quotas(usage)
    await quotas.lease_reference("r", 60.0)
    await quotas.release_reference("r")
    await quotas.lease_session("a", 60.0)
    async with quotas.streaming("a"):
        await hear(quotas, 100)
        await quotas.save()
    await quotas.release_session("a")
