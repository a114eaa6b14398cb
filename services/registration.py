"""A worker's entry in the registry of its cell, from which gateways discover it."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol

from avatar.aio import Attempts, background
from avatar.errors import StoreUnavailable
from avatar.rpc.server import Servicer
from avatar.store.registry import WorkerRegistry
from avatar.worker.v1.discovery_pb2 import WorkerState

logger = logging.getLogger(__name__)

# Longest time between two writes of a worker's state.
HEARTBEAT_S = 0.8
# Changes that follow each other within this time are one write.
SETTLE_S = 0.02


class WorkerServicer(Servicer, Protocol):
    """The service of a worker. stage: field of WorkerState. changed: set when a stream is accepted or ends."""

    stage: str
    changed: asyncio.Event

    def info(self) -> Any:
        """Return the answer to GetInfo."""


@asynccontextmanager
async def registered(registry: WorkerRegistry, address: str, servicer: WorkerServicer) -> AsyncGenerator[None, None]:
    """Keep a worker registered while the body runs.

    address: HOST:PORT at which gateways reach it. If its state cannot be written, for any reason, the worker serves on,
    since gateways ask it directly, and the next write is tried.
    """
    async with background(_write_forever(registry, address, servicer)):
        yield
    with suppress(StoreUnavailable):
        await registry.remove(servicer.stage, address)


async def _write_forever(registry: WorkerRegistry, address: str, servicer: WorkerServicer) -> None:
    """Write the worker's state at every heartbeat, and soon after every change."""
    attempts = Attempts(
        logger, "worker not registered", "worker registered again", expected=StoreUnavailable, address=address
    )
    while True:
        servicer.changed.clear()
        # Not only StoreUnavailable: an error in our code must not end the streams, which need no registry.
        with attempts:
            await registry.write(WorkerState(address=address, **{servicer.stage: servicer.info()}))
        with suppress(TimeoutError):
            async with asyncio.timeout(HEARTBEAT_S):
                await servicer.changed.wait()
        await asyncio.sleep(SETTLE_S)
