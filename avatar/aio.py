"""A task that runs while the body of an `async with` runs."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager
from typing import Any


@asynccontextmanager
async def background(coroutine: Coroutine[Any, Any, None]) -> AsyncGenerator[asyncio.Task[None], None]:
    """Run a coroutine while the body runs; cancel it, and wait until it has ended, when the body ends.

    Unlike a TaskGroup this does not cancel the body when the coroutine fails: the body decides what a failure means.
    So it can be used in async generators, whose body runs in whichever task asks for the next item.
    """
    task = asyncio.get_running_loop().create_task(coroutine)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # the body could read it; avoid asyncio's "exception was never retrieved"
