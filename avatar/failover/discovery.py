"""One process's reader of the registry of workers: all pools of the process share its reads."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from avatar.aio import background
from avatar.errors import StoreUnavailable
from avatar.worker.v1.discovery_pb2 import WorkerStates

logger = logging.getLogger(__name__)

READ_EVERY_S = 0.5
# Before a read that is asked for, workers get this time to write what has just changed.
SETTLE_S = 0.02
# Reads that are asked for are at least so far apart: whoever asks meanwhile shares the next one.
APART_S = 0.05


class Discovery:
    """Reads the registry twice a second and on request, and hands the states of each stage to its pool.

    While the registry cannot be read, the pools keep the last states.
    """

    def __init__(self, read: Callable[[], Awaitable[WorkerStates]]) -> None:
        """read: returns the states of all workers; StoreUnavailable if it cannot."""
        self._read = read
        self._followers: dict[str, Callable[[Mapping[str, Any]], None]] = {}
        self._waiting: list[asyncio.Future[None]] = []
        self._is_wanted = asyncio.Event()
        self._read_s = 0.0
        self._is_away = False

    def follow(self, stage: str, take: Callable[[Mapping[str, Any]], None]) -> None:
        """Call `take` after every read with the stage's workers: address -> answer to GetInfo."""
        self._followers[stage] = take

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """Read the registry once, and then while the body runs."""
        await self._read_once()
        async with background(self._read_forever()):
            yield

    async def refresh(self) -> None:
        """Wait for a read that begins after this call, or for its failure."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        self._is_wanted.set()
        await waiter

    async def _read_forever(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(READ_EVERY_S):
                    await self._is_wanted.wait()
            if self._is_wanted.is_set():
                await asyncio.sleep(max(SETTLE_S, self._read_s + APART_S - time.monotonic()))
            await self._read_once()

    async def _read_once(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._is_wanted.clear()
        try:
            states = await self._read()
            if self._is_away:
                logger.info("registry of workers read again")
            self._is_away = False
            self._hand_out(states)
        except StoreUnavailable as error:
            if not self._is_away:
                logger.warning("registry of workers not read; the last states hold", extra={"problem": error.message})
            self._is_away = True
        finally:
            self._read_s = time.monotonic()
            for waiter in waiting:
                if not waiter.done():
                    waiter.set_result(None)

    def _hand_out(self, states: WorkerStates) -> None:
        by_stage: dict[str, dict[str, Any]] = {stage: {} for stage in self._followers}
        for state in states.workers:
            stage: str | None = state.WhichOneof("info")
            if stage and stage in by_stage:
                by_stage[stage][state.address] = getattr(state, stage)
        for stage, take in self._followers.items():
            take(by_stage[stage])
