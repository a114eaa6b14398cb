"""The process of one device: several workers on one device queue.

    python -m services.device audio denoiser vae

They serve at one address, AVATAR_LISTEN, where each is registered as the worker of its own stage. One queue orders the
work of all of them by deadline; processes that shared a device would delay each other.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

from avatar.rpc.server import until_stopped
from avatar.settings import PREFIX, AudioSettings, DenoiserSettings, TextSettings, VaeSettings, WorkerSettings, load
from services.audio.__main__ import build as build_audio
from services.denoiser.__main__ import build as build_denoiser
from services.process import run
from services.registration import WorkerServicer
from services.text.__main__ import build as build_text
from services.vae.__main__ import build as build_vae
from services.worker import WorkerProcess, worker_process

# By name: the class of its settings, and the function that builds it.
SERVICES: dict[str, tuple[type[WorkerSettings], Callable[[Any, WorkerProcess], WorkerServicer]]] = {
    "audio": (AudioSettings, lambda settings, worker: build_audio(settings, worker.queue)),
    "denoiser": (DenoiserSettings, lambda settings, worker: build_denoiser(settings, worker.store, worker.queue)),
    "vae": (VaeSettings, lambda settings, worker: build_vae(settings, worker.queue)),
    "text": (TextSettings, lambda settings, worker: build_text(settings, worker.store, worker.queue)),
}


async def main(services: Sequence[str]) -> None:
    """Run these services. The address is AVATAR_LISTEN, by default that of the first one."""
    settings = {name: load(SERVICES[name][0], os.environ) for name in dict.fromkeys(services)}
    if getattr(settings.get("denoiser"), "chain", ""):
        raise ValueError(f"{PREFIX}CHAIN needs denoisers in processes of their own: python -m services.denoiser")
    async with worker_process("device", settings[services[0]]) as worker:
        servicers = [SERVICES[name][1](each, worker) for name, each in settings.items()]
        async with worker.serving(*servicers):
            await until_stopped()


if __name__ == "__main__":
    run(main, SERVICES)
