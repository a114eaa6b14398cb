"""A denoiser's process: `python -m services.denoiser`."""

import asyncio
import logging
import os
import threading
from contextlib import AsyncExitStack

from avatar.aio import background
from avatar.handoff.chain import Chain, join_chain
from avatar.rpc.server import until_stopped
from avatar.runtime.device_queue import DeviceQueue
from avatar.settings import PREFIX, DenoiserSettings, load
from avatar.store.sessions import SessionStore
from services.denoiser.loading import latent_sizes, load_denoisers
from services.denoiser.service import DenoiserServicer
from services.process import run
from services.worker import naming_setting, worker_process

logger = logging.getLogger(__name__)

# A lost peer is noticed within 6 s, and its neighbours have ended within 10 s. Streams that wait for their caller would
# keep them for as long as a drain takes, in vain.
EXIT_S = 3.0


def build(settings: DenoiserSettings, store: SessionStore, queue: DeviceQueue) -> DenoiserServicer:
    """Build the service over the checkpoint's network, and warm it up for the settings' sizes."""
    sizes = latent_sizes(settings)
    denoisers, digest = load_denoisers(settings, sizes)
    servicer = DenoiserServicer(denoisers, digest, store, queue, settings.capacity)
    if not sizes:
        hint = f"name the videos' sizes in {PREFIX}SIZES"
        logger.warning("not warm: the first stream will be late", extra={"hint": hint})
    with naming_setting("sizes"):
        for size in sizes:
            queue.submit(servicer.warm, *size).result()
    return servicer


async def main() -> None:
    settings = load(DenoiserSettings, os.environ)
    async with worker_process("denoiser", settings) as worker, AsyncExitStack() as stack:
        servicer = build(settings, worker.store, worker.queue)
        if settings.chain:
            with naming_setting("chain"):
                member = servicer.chain_member(settings.chain_backend)
                servicer.chain = await stack.enter_async_context(join_chain(settings.chain, member))
        await stack.enter_async_context(worker.serving(servicer))
        await until_stopped_or_lost(servicer.chain)


async def until_stopped_or_lost(chain: Chain | None) -> None:
    """Wait for SIGTERM or SIGINT. StageLost if the chain is lost first: only new processes can join a new one.

    The process then has EXIT_S to end in order, and is ended if a wait for the lost peer keeps it.
    """
    if chain is None:
        await until_stopped()
        return
    async with background(until_stopped()) as stopping, background(chain.until_broken()) as losing:
        await asyncio.wait({stopping, losing}, return_when=asyncio.FIRST_COMPLETED)
        if not stopping.done():
            ending = threading.Timer(EXIT_S, os._exit, [1])
            ending.daemon = True
            ending.start()
            chain.check()


if __name__ == "__main__":
    run(main)
