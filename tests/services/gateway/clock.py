"""A clock that tests set, and a wait until the event loop is idle."""

import asyncio
from dataclasses import dataclass


@dataclass
class Clock:
    """A callable clock: it returns `now_s`, in seconds, which only a test changes."""

    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


async def settled() -> None:
    """Let every task run until it waits for a timer or for I/O."""
    for _ in range(300):
        await asyncio.sleep(0)
