"""Workers in a thread of their own, which tests share although each has an event loop of its own."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

from avatar.settings import GatewaySettings
from avatar.store.redis import RedisHashes
from avatar.store.sessions import SessionStore
from services.local.suite import workers

WAIT_S = 30.0


@contextmanager
def workers_in_thread(
    checkpoint: Path, redis_url: str, settings: GatewaySettings, **worker: Any
) -> Iterator[GatewaySettings]:
    """Run a checkpoint's workers while the body runs; yield the settings of a gateway over them.

    worker: further settings of all workers. Give them a cell of their own: they are registered while other tests read
    the registry of `main`.
    """
    given, stop, thread = Future[GatewaySettings](), Event(), ThreadPoolExecutor(1)

    async def serve() -> None:
        store = SessionStore(RedisHashes(redis_url))
        async with workers(checkpoint, store, settings, **worker) as found:
            given.set_result(found)
            await asyncio.to_thread(stop.wait)
        await store.aclose()

    with thread:
        serving = thread.submit(asyncio.run, serve())
        try:
            yield given.result(WAIT_S)
        finally:
            stop.set()
            serving.result(WAIT_S)
