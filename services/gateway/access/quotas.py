"""Quotas of tenants, counted over all gateways.

Sessions and references are leases of names in the store; the gateway renews the lease of an open stream, so that it
expires soon after a gateway dies. Audio is counted here and added to the store's counter every few seconds.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress

from avatar.aio import background
from avatar.errors import QuotaExceeded, StoreUnavailable
from avatar.store.sessions import LOCK_TTL_S
from avatar.store.usage import TenantUsage
from avatar.v1 import avatar_service_pb2 as pb
from services.gateway.access.tenants import Tenant, caller

DAY_S = 86400.0
SAVE_S = LOCK_TTL_S / 3
# Seconds after which a client is told to try again where all its sessions are in use.
RETRY_S = 1.0


class Quotas:
    """The usage of all callers, checked against their quotas.

    Whatever adds to it raises QuotaExceeded, or StoreUnavailable if the usage cannot be read.
    """

    def __init__(self, usage: TenantUsage) -> None:
        self._usage = usage
        self._streaming: dict[str, Tenant] = {}
        self._renewing = asyncio.Lock()
        # Seconds of each tenant's audio that are not in the store yet; and the day and the total that are.
        self._unsaved: defaultdict[str, float] = defaultdict(float)
        self._saved: dict[str, tuple[int, float]] = {}

    async def lease_reference(self, reference_id: str, ttl_s: float) -> None:
        """Count a reference of the caller for ttl_s."""
        await self._lease("references", caller().max_references, reference_id, ttl_s)

    async def release_reference(self, reference_id: str) -> None:
        """Stop counting a reference of the caller."""
        if caller().max_references is not None:
            await self._usage.release(_leases(caller(), "references"), reference_id)

    async def lease_session(self, session_id: str, ttl_s: float) -> None:
        """Count a session of the caller for ttl_s, longer if it is streamed."""
        await self._lease("sessions", caller().max_sessions, session_id, ttl_s, RETRY_S)

    async def release_session(self, session_id: str) -> None:
        """Stop counting a session of the caller."""
        if caller().max_sessions is not None:
            await self._usage.release(_leases(caller(), "sessions"), session_id)

    @asynccontextmanager
    async def streaming(self, session_id: str) -> AsyncGenerator[None, None]:
        """Count a session of the caller while its stream is open, and no longer."""
        tenant = caller()
        if tenant.max_audio_s is not None:
            await self._save_audio(tenant.name)
            self._check_audio(tenant)
        await self.lease_session(session_id, LOCK_TTL_S)
        self._streaming[session_id] = tenant
        try:
            yield
        finally:
            del self._streaming[session_id]
            async with self._renewing:
                pass  # a renewal that had begun is over, and no other follows
            with suppress(StoreUnavailable):
                await self.release_session(session_id)

    async def metered(
        self, requests: AsyncIterator[pb.StreamAvatarRequest], bytes_per_s: int
    ) -> AsyncGenerator[pb.StreamAvatarRequest, None]:
        """Pass a stream's requests on and count their audio. QuotaExceeded once the day's audio is used up."""
        tenant = caller()
        async for request in requests:
            if tenant.max_audio_s is not None and request.HasField("audio"):
                self._check_audio(tenant)
                self._unsaved[tenant.name] += len(request.audio.data) / bytes_per_s
            yield request

    async def keep(self) -> None:
        """Save every few seconds, for ever; later if the store cannot be reached."""
        while True:
            await asyncio.sleep(SAVE_S)
            with suppress(StoreUnavailable):
                await self.save()

    async def save(self) -> None:
        """Renew the leases of open streams, and add the counted audio to the store's counters."""
        for session_id, tenant in list(self._streaming.items()):
            async with self._renewing:
                if session_id in self._streaming and tenant.max_sessions is not None:
                    # Without a limit: an open stream is not ended, even if others took its place meanwhile.
                    await self._usage.lease(_leases(tenant, "sessions"), session_id, LOCK_TTL_S)
        for name in list(self._unsaved):
            await self._save_audio(name)

    async def _lease(self, kind: str, limit: int | None, name: str, ttl_s: float, retry_s: float | None = None) -> None:
        if limit is not None and not await self._usage.lease(_leases(caller(), kind), name, ttl_s, limit):
            message = f"all {limit} {kind} of tenant {caller().name} are in use"
            raise QuotaExceeded(message, metadata={"quota": kind}, retry_s=retry_s)

    async def _save_audio(self, name: str) -> None:
        seconds, day = self._unsaved.pop(name, 0.0), _today()
        try:
            total = await self._usage.add(f"{name}/audio/{day}", seconds, 2 * DAY_S)
        except BaseException:
            self._unsaved[name] += seconds
            raise
        self._saved[name] = day, total

    def _check_audio(self, tenant: Tenant) -> None:
        day, total = self._saved.get(tenant.name, (0, 0.0))
        used = self._unsaved[tenant.name] + (total if day == _today() else 0.0)
        if tenant.max_audio_s is not None and used >= tenant.max_audio_s:
            message = f"all {tenant.max_audio_s:g} s of audio that tenant {tenant.name} may send in a day are used up"
            raise QuotaExceeded(message, metadata={"quota": "audio"}, retry_s=DAY_S - time.time() % DAY_S)


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
