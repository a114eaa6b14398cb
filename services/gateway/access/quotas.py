"""Quotas of tenants, counted over all gateways.

Sessions and references are leases of names in the store. A session counts as long as its record: the gateway that has
its stream renews both. Audio is reserved in the store before it is used, about a second at a time.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

from avatar.aio import Attempts, background
from avatar.errors import QuotaExceeded, StoreUnavailable
from avatar.store.claims import CLAIM_TTL_S, CLOSED_TTL_S, Claim
from avatar.store.usage import TenantUsage
from avatar.v1 import avatar_service_pb2 as pb
from services.gateway.access.tenants import Tenant, caller

logger = logging.getLogger(__name__)

DAY_S = 86400.0
SAVE_S = CLAIM_TTL_S / 3
# A session's lease is longer than its record lives by this time, in which its gateway renews it.
MARGIN_S = CLAIM_TTL_S
# The longest that a reservation lasts if its gateway dies, and longer than a picture takes.
ENCODING_S = 300.0
# Audio that is reserved at a time, in seconds; and less than any audio.
AHEAD_S, ROUNDING_S = 1.0, 1e-6
# Seconds after which a client is told to try again where all its sessions are in use.
RETRY_S = 1.0


class _AudioBudget:
    """Audio of one tenant that this gateway has reserved and not used.

    left_s: seconds, of the audio of `day`; negative for what was sent while the store was away. num_streams: open here.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.left_s = 0.0
        self.day = _today()
        self.num_streams = 0
        self.is_store_away = False
        self.lock = asyncio.Lock()

    @property
    def counter(self) -> str:
        return f"{self.name}/audio/{self.day}"


class Quotas:
    """The usage of all callers, checked against their quotas.

    Whatever adds to it raises QuotaExceeded, or StoreUnavailable if the usage cannot be read.
    """

    def __init__(self, usage: TenantUsage) -> None:
        self._usage = usage
        self._streaming: dict[Claim, Tenant] = {}
        self._renewing = asyncio.Lock()
        self._budgets: dict[str, _AudioBudget] = {}

    @asynccontextmanager
    async def reference(self, name: str) -> AsyncGenerator[str, None]:
        """Reserve a slot for a reference of the caller while the body encodes it; yield the reservation.

        A name that counts already needs none: the reservation is then empty.
        """
        limit, leases, reservation = caller().max_references, _leases(caller(), "references"), ""
        # With a limit of 0 nothing new is leased.
        if limit is not None and not await self._usage.lease(leases, name, ENCODING_S, 0, renews=False):
            reservation = secrets.token_hex(8)
            await self._lease("references", limit, reservation, ENCODING_S)
        try:
            yield reservation
        finally:
            if reservation:
                with suppress(StoreUnavailable):
                    await self._usage.release(leases, reservation)

    async def lease_reference(self, name: str, ttl_s: float, reservation: str = "") -> None:
        """Count a reference of the caller for ttl_s, in the place of its reservation."""
        await self._lease("references", caller().max_references, name, ttl_s, replaces=reservation)

    async def release_reference(self, name: str) -> None:
        """Stop counting a reference of the caller."""
        if caller().max_references is not None:
            await self._usage.release(_leases(caller(), "references"), name)

    async def lease_session(self, session_id: str, ttl_s: float) -> None:
        """Count a session of the caller as long as its record lives, which is ttl_s if it is not streamed."""
        await self._lease("sessions", caller().max_sessions, session_id, ttl_s + MARGIN_S, retry_s=RETRY_S)

    async def release_session(self, session_id: str) -> None:
        """Stop counting a session of the caller."""
        if caller().max_sessions is not None:
            await self._usage.release(_leases(caller(), "sessions"), session_id)

    async def sessions(self) -> list[str]:
        """Return the ids of the caller's sessions that count, the one that expires first in front."""
        return await self._usage.names(_leases(caller(), "sessions"))

    @asynccontextmanager
    async def streaming(self, claim: Claim) -> AsyncGenerator[None, None]:
        """Count a session of the caller while its stream is open, and afterwards as long as its record lives."""
        tenant = caller()
        async with self._audio_budget(tenant):
            ttl_s = claim.ttl_s + MARGIN_S
            await self._lease("sessions", tenant.max_sessions, claim.session_id, ttl_s, renews=False, retry_s=RETRY_S)
            self._streaming[claim] = tenant
            try:
                yield
            finally:
                del self._streaming[claim]
                async with self._renewing:
                    pass  # a renewal that had begun is over, and no other follows
                if tenant.max_sessions is not None:
                    with suppress(StoreUnavailable):
                        await self._end_lease(_leases(tenant, "sessions"), claim)

    async def metered(
        self, requests: AsyncIterator[pb.StreamAvatarRequest], bytes_per_s: int, heard_bytes_per_s: int
    ) -> AsyncGenerator[pb.StreamAvatarRequest, None]:
        """Pass a stream's requests on and count their audio. QuotaExceeded once the day's audio is used up.

        heard_bytes_per_s: of the other person's audio, which counts too.
        """
        use_audio = self.audio_meter()
        async for request in requests:
            if request.HasField("audio"):
                await use_audio(len(request.audio.data) / bytes_per_s)
            elif request.HasField("listen"):
                await use_audio(len(request.listen.data) / heard_bytes_per_s)
            yield request

    def audio_meter(self) -> Callable[[float], Awaitable[None]]:
        """Return a function that counts seconds of the caller's audio, and raises QuotaExceeded if none are left."""
        tenant = caller()

        async def use_audio(seconds: float) -> None:
            if tenant.max_audio_s is not None:
                await self._use_audio(tenant, seconds)

        return use_audio

    async def keep(self) -> None:
        """Save every few seconds, for ever; later if the store cannot be reached."""
        attempts = Attempts(logger, "usage not saved", "usage saved again", expected=StoreUnavailable)
        while True:
            await asyncio.sleep(SAVE_S)
            with attempts:
                await self.save()

    async def save(self) -> None:
        """Renew the leases of open streams, and settle what was sent while the store was away."""
        for claim, tenant in list(self._streaming.items()):
            async with self._renewing:
                if claim in self._streaming and tenant.max_sessions is not None and claim.ttl_s:
                    # Without a limit: an open stream is not ended, even if others took its place meanwhile.
                    await self._usage.lease(_leases(tenant, "sessions"), claim.session_id, claim.ttl_s + MARGIN_S)
        for budget in list(self._budgets.values()):
            await self._settle_audio(budget)

    async def _end_lease(self, leases: str, claim: Claim) -> None:
        """End a session's lease with its record; one that goes on elsewhere keeps it."""
        if not claim.ttl_s:
            await self._usage.release(leases, claim.session_id)
        elif claim.is_closed:
            await self._usage.lease(leases, claim.session_id, CLOSED_TTL_S + MARGIN_S)

    async def _lease(
        self,
        kind: str,
        limit: int | None,
        name: str,
        ttl_s: float,
        *,
        renews: bool = True,
        replaces: str = "",
        retry_s: float | None = None,
    ) -> None:
        if limit is None:
            return
        leases = _leases(caller(), kind)
        if not await self._usage.lease(leases, name, ttl_s, limit, renews=renews, replaces=replaces):
            message = f"all {limit} {kind} of tenant {caller().name} are in use"
            raise QuotaExceeded(message, metadata={"quota": kind}, retry_s=retry_s)

    @asynccontextmanager
    async def _audio_budget(self, tenant: Tenant) -> AsyncGenerator[None, None]:
        """Keep a tenant's budget while the body runs. QuotaExceeded if the day's audio is used up."""
        if tenant.max_audio_s is None:
            yield
            return
        budget = self._budgets.setdefault(tenant.name, _AudioBudget(tenant.name))
        budget.num_streams += 1
        try:
            async with budget.lock:
                await self._reserve_audio(budget, tenant, 0.0)
            yield
        finally:
            budget.num_streams -= 1
            with suppress(StoreUnavailable):
                await self._settle_audio(budget)

    async def _use_audio(self, tenant: Tenant, seconds: float) -> None:
        """Count audio. A store that is away stops no stream; what is sent meanwhile is counted later."""
        budget = self._budgets.setdefault(tenant.name, _AudioBudget(tenant.name))
        async with budget.lock:
            if not budget.is_store_away:
                try:
                    await self._reserve_audio(budget, tenant, seconds)
                except StoreUnavailable:
                    budget.is_store_away = True
            budget.left_s -= seconds

    async def _reserve_audio(self, budget: _AudioBudget, tenant: Tenant, seconds: float) -> None:
        """Reserve audio until the budget has so many seconds, or any if that is 0. QuotaExceeded if there are none."""
        assert tenant.max_audio_s is not None
        if budget.day != _today():
            budget.day, budget.left_s = _today(), 0.0
        if budget.left_s > ROUNDING_S and budget.left_s >= seconds:
            return
        least_s = seconds - budget.left_s
        amount_s = max(least_s, AHEAD_S)
        taken_s = await self._usage.take(budget.counter, amount_s, least_s, tenant.max_audio_s, 2 * DAY_S)
        if not taken_s:
            budget.left_s = min(budget.left_s, 0.0)  # less than a piece of audio: used up
            message = f"all {tenant.max_audio_s:g} s of audio that tenant {tenant.name} may send in a day are used up"
            raise QuotaExceeded(message, metadata={"quota": "audio"}, retry_s=DAY_S - time.time() % DAY_S)
        budget.left_s += taken_s

    async def _settle_audio(self, budget: _AudioBudget) -> None:
        """Count what was sent while the store was away, and return what the last stream of a tenant has left."""
        async with budget.lock:
            left_s = budget.left_s if budget.left_s < 0 or not budget.num_streams else 0.0
            if left_s or budget.is_store_away:
                budget.left_s -= left_s
                try:
                    await self._usage.add(budget.counter, -left_s, 2 * DAY_S)
                except BaseException:
                    budget.left_s += left_s
                    raise
                budget.is_store_away = False
            if not (budget.num_streams or budget.left_s):
                self._budgets.pop(budget.name, None)


@asynccontextmanager
async def open_quotas(usage: TenantUsage) -> AsyncGenerator[Quotas, None]:
    """Count quotas while the body runs."""
    quotas = Quotas(usage)
    async with background(quotas.keep()):
        yield quotas
    with suppress(StoreUnavailable):
        await quotas.save()


def _leases(tenant: Tenant, kind: str) -> str:
    return f"{tenant.name}/{kind}"


def _today() -> int:
    """Return the days since 1970, in UTC."""
    return int(time.time() // DAY_S)
