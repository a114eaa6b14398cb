"""How much each tenant uses, against how much it may, over all gateways.

Sessions and references are names with a lease in the store; the gateway renews the lease of an open stream, and it
expires soon after the gateway dies. Audio is counted here and added to the store's counter every few seconds.
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
# A session ends now and then.
RETRY_S = 1.0


class Quotas:
    """What the callers use. All that takes something raises QuotaExceeded, or StoreUnavailable if nobody knows."""

    def __init__(self, usage: TenantUsage) -> None:
        self._usage = usage
        self._streaming: dict[str, Tenant] = {}
        self._holding = asyncio.Lock()
        # Seconds of each tenant's audio: not yet added to the store, and the store's total with its day.
        self._unsaved: defaultdict[str, float] = defaultdict(float)
        self._saved: dict[str, tuple[int, float]] = {}

    async def take_reference(self, reference_id: str, ttl_s: float) -> None:
        """Count a reference among those of the caller, for so long."""
        await self._hold("references", caller().max_references, reference_id, ttl_s)

    async def return_reference(self, reference_id: str) -> None:
        """Count it no more."""
        if caller().max_references is not None:
            await self._usage.release(_held(caller(), "references"), reference_id)

    async def take_session(self, session_id: str, ttl_s: float) -> None:
        """Count a session among those of the caller, for so long unless it is streamed."""
        await self._hold("sessions", caller().max_sessions, session_id, ttl_s, RETRY_S)

    async def return_session(self, session_id: str) -> None:
        """Count it no more."""
        if caller().max_sessions is not None:
            await self._usage.release(_held(caller(), "sessions"), session_id)

    @asynccontextmanager
    async def streaming(self, session_id: str) -> AsyncGenerator[None, None]:
        """Count a session of the caller while its stream is open, and not afterwards."""
        tenant = caller()
        if tenant.max_audio_s is not None:
            await self._save_sound(tenant.name)
            self._check_sound(tenant)
        await self.take_session(session_id, LOCK_TTL_S)
        self._streaming[session_id] = tenant
        try:
            yield
        finally:
            del self._streaming[session_id]
            async with self._holding:
                pass  # it is not being held again any more
            with suppress(StoreUnavailable):
                await self.return_session(session_id)

    async def metered(
        self, requests: AsyncIterator[pb.StreamAvatarRequest], bytes_per_s: int
    ) -> AsyncGenerator[pb.StreamAvatarRequest, None]:
        """What the caller sends on a stream, its sound counted. QuotaExceeded once the day's is used up."""
        tenant = caller()
        async for request in requests:
            if tenant.max_audio_s is not None and request.HasField("audio"):
                self._check_sound(tenant)
                self._unsaved[tenant.name] += len(request.audio.data) / bytes_per_s
            yield request

    async def keep(self) -> None:
        """Hold what is streaming, and save what was heard, for ever; later if the store cannot be reached."""
        while True:
            await asyncio.sleep(SAVE_S)
            with suppress(StoreUnavailable):
                await self.save()

    async def save(self) -> None:
        """The same once."""
        for session_id, tenant in list(self._streaming.items()):
            async with self._holding:
                if session_id in self._streaming and tenant.max_sessions is not None:
                    # Whatever others have taken meanwhile: what runs is not ended.
                    await self._usage.lease(_held(tenant, "sessions"), session_id, LOCK_TTL_S)
        for name in list(self._unsaved):
            await self._save_sound(name)

    async def _hold(self, what: str, most: int | None, name: str, ttl_s: float, retry_s: float | None = None) -> None:
        if most is not None and not await self._usage.lease(_held(caller(), what), name, ttl_s, most):
            message = f"all {most} {what} that {caller().name} may have are taken"
            raise QuotaExceeded(message, metadata={"quota": what}, retry_s=retry_s)

    async def _save_sound(self, name: str) -> None:
        seconds, day = self._unsaved.pop(name, 0.0), _today()
        try:
            total = await self._usage.add(f"{name}/audio/{day}", seconds, 2 * DAY_S)
        except BaseException:
            self._unsaved[name] += seconds
            raise
        self._saved[name] = day, total

    def _check_sound(self, tenant: Tenant) -> None:
        day, total = self._saved.get(tenant.name, (0, 0.0))
        used = self._unsaved[tenant.name] + (total if day == _today() else 0.0)
        if tenant.max_audio_s is not None and used >= tenant.max_audio_s:
            message = f"all {tenant.max_audio_s:g} s of sound that {tenant.name} may send in a day are used up"
            raise QuotaExceeded(message, metadata={"quota": "audio"}, retry_s=DAY_S - time.time() % DAY_S)


@asynccontextmanager
async def counted(usage: TenantUsage) -> AsyncGenerator[Quotas, None]:
    """Quotas that are kept while the body runs."""
    quotas = Quotas(usage)
    async with background(quotas.keep()):
        yield quotas
    with suppress(StoreUnavailable):
        await quotas.save()


def _held(tenant: Tenant, what: str) -> str:
    return f"{tenant.name}/{what}"


def _today() -> int:
    """Days since 1970, by UTC."""
    return int(time.time() // DAY_S)
