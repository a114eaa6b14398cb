"""A clock that a test sets, and a wait until the event loop has nothing to do."""

import asyncio
from dataclasses import dataclass


@dataclass
class Clock:
    """Seconds that stand still until a test moves them."""

    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


async def settled() -> None:
    """Let every task run until it waits for something else."""
    for _ in range(300):
        await asyncio.sleep(0)
