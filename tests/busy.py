"""A busy device, to look at the jobs that wait for it."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from avatar.runtime.device_queue import DeviceQueue

WAIT_S = 10.0


@contextmanager
def busy(queue: DeviceQueue) -> Iterator[None]:
    """Keep the device computing until the body ends."""
    started, released = threading.Event(), threading.Event()

    def compute() -> None:
        started.set()
        assert released.wait(WAIT_S)

    queue.submit(compute)
    assert started.wait(WAIT_S)
    try:
        yield
    finally:
        released.set()


async def until_waiting(queue: DeviceQueue, number: int) -> None:
    """Wait until this many jobs are in the queue."""
    async with asyncio.timeout(WAIT_S):
        while queue.num_waiting != number:  # noqa: ASYNC110 - the queue has no event for it
            await asyncio.sleep(0)
