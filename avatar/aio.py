"""Tasks that run while the body of an `async with` runs, or to their end."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

Result = TypeVar("Result")


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


async def uncancelled(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Return a coroutine's result. If the caller is cancelled meanwhile, the coroutine still runs to its end first."""
    task = asyncio.get_running_loop().create_task(coroutine)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # nobody else reads it
        raise
