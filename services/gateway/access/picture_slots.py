"""Slots for pictures at the VAE workers, shared fairly among tenants.

One picture at a time is sent to each worker. The tenants whose pictures wait take turns, so that a tenant with one
picture waits for one picture of somebody else at most, however many others send.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from avatar.errors import NoCapacity
from services.gateway.access.tenants import caller

# Pictures of one tenant that wait at a gateway, and for how long. Each is in memory.
MAX_WAITING, WAIT_S = 8, 30.0
RETRY_S = 1.0


class PictureSlots:
    """The slots of all workers. num_slots: returns how many there are now."""

    def __init__(self, num_slots: Callable[[], int]) -> None:
        self._num_slots = num_slots
        self._num_taken = 0
        # By tenant, in the order of their turns.
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._last: str | None = None

    @asynccontextmanager
    async def slot(self) -> AsyncGenerator[None, None]:
        """Hold a slot for a picture of the caller. NoCapacity if too many of its pictures wait, or for too long."""
        await self._take(caller().name)
        try:
            yield
        finally:
            self._num_taken -= 1
            self._give()

    async def _take(self, tenant: str) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(tenant, deque())
        if len(waiting) >= MAX_WAITING:
            raise NoCapacity(f"{MAX_WAITING} pictures are waiting already", retry_s=RETRY_S)
        waiting.append(turn)
        self._give()
        try:
            async with asyncio.timeout(WAIT_S):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():  # the slot came too late
                self._num_taken -= 1
                self._give()
            elif turn in waiting:
                waiting.remove(turn)
                if not waiting and self._waiting.get(tenant) is waiting:
                    del self._waiting[tenant]
            if isinstance(error, TimeoutError):
                raise NoCapacity(f"no picture could be prepared in {WAIT_S:g} s", retry_s=RETRY_S) from error
            raise

    def _give(self) -> None:
        """Give free slots to the tenants in turn."""
        # At least one: without a worker, the call says so.
        while self._waiting and self._num_taken < max(1, self._num_slots()):
            # Never the tenant that had the last turn, if another one waits.
            tenant = next((each for each in self._waiting if each != self._last), next(iter(self._waiting)))
            waiting = self._waiting.pop(tenant)
            turn = waiting.popleft()
            if waiting:
                self._waiting[tenant] = waiting  # behind all others
            if not turn.done():
                turn.set_result(None)
                self._num_taken += 1
                self._last = tenant
