"""A device that is busy, so that what waits for it can be seen."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from avatar.runtime.device_queue import Device

WAIT_S = 10.0


@contextmanager
def busy(device: Device) -> Iterator[None]:
    """The device computes until the body ends."""
    begun, done = threading.Event(), threading.Event()

    def compute() -> None:
        begun.set()
        assert done.wait(WAIT_S)

    device.submit(compute)
    assert begun.wait(WAIT_S)
    try:
        yield
    finally:
        done.set()


async def until_waiting(device: Device, number: int) -> None:
    """Until so many jobs wait."""
    async with asyncio.timeout(WAIT_S):
        while device.num_waiting != number:  # noqa: ASYNC110 - the device tells nobody
            await asyncio.sleep(0)
