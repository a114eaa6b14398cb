"""Waits of the tests of integrations."""

import asyncio
from collections.abc import Callable

WAIT_S = 20.0


async def until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds. TimeoutError after WAIT_S seconds."""
    async with asyncio.timeout(WAIT_S):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)
