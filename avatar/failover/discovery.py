"""One process's reader of the registry of workers: all pools of the process share its reads."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from avatar.aio import Attempts, background
from avatar.errors import StoreUnavailable
from avatar.worker.v1.discovery_pb2 import WorkerStates

logger = logging.getLogger(__name__)

READ_EVERY_S = 0.5
# A read that is younger is fresh enough to refuse a session by.
FRESH_S = 0.05
# Workers get this time to write what has just changed.
SETTLE_S = 0.03


class Discovery:
    """Reads the registry twice a second and on request, and hands the states of each stage to its pool.

    While the registry cannot be read, for any reason, the pools keep the last states, and the next read is tried.
    """

    def __init__(self, read: Callable[[], Awaitable[WorkerStates]]) -> None:
        """read: returns the states of all workers; StoreUnavailable if it cannot."""
        self._read = read
        self._followers: dict[str, Callable[[Mapping[str, Any]], None]] = {}
        self._waiting: list[asyncio.Future[None]] = []
        self._is_wanted = asyncio.Event()
        self._read_s = -math.inf
        self._attempts = Attempts(
            logger,
            "registry of workers not read; the last states hold",
            "registry of workers read again",
            expected=StoreUnavailable,
        )

    def follow(self, stage: str, take: Callable[[Mapping[str, Any]], None]) -> None:
        """Call `take` after every read with the stage's workers: address -> answer to GetInfo."""
        self._followers[stage] = take

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """Read the registry once, and then while the body runs. If it cannot be read yet, all workers are asked."""
        await self._read_once()
        if self._attempts.has_failed:
            self._hand_out(WorkerStates())
        try:
            async with background(self._read_forever()):
                yield
        finally:
            _wake(self._waiting)

    async def refresh(self, *, settled: bool = False) -> None:
        """Wait for a read of the last FRESH_S, or the next one, or its failure. All who wait share the next one.

        settled: for one that begins SETTLE_S after this call.
        """
        if settled:
            await asyncio.sleep(SETTLE_S)
        elif time.monotonic() - self._read_s < FRESH_S:
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        self._is_wanted.set()
        await waiter

    async def _read_forever(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(READ_EVERY_S):
                    await self._is_wanted.wait()
            await self._read_once()

    async def _read_once(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._is_wanted.clear()
        started_s = time.monotonic()
        try:
            # Not only StoreUnavailable: the gateways of a cell read the same bytes, so an error in our code would end
            # all of them together, with their streams, which need no registry.
            with self._attempts:
                self._hand_out(await self._read())
        finally:
            self._read_s = started_s
            _wake(waiting)

    def _hand_out(self, states: WorkerStates) -> None:
        by_stage: dict[str, dict[str, Any]] = {stage: {} for stage in self._followers}
        for state in states.workers:
            stage: str | None = state.WhichOneof("info")
            if stage and stage in by_stage:
                by_stage[stage][state.address] = getattr(state, stage)
        for stage, take in self._followers.items():
            take(by_stage[stage])


def _wake(waiting: list[asyncio.Future[None]]) -> None:
    for waiter in waiting:
        if not waiter.done():
            waiter.set_result(None)
