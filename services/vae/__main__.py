"""The VAE worker's process: `python -m services.vae`."""

import logging
import os

from avatar.checkpoints.layouts import open_part
from avatar.rpc.server import until_stopped
from avatar.runtime.device_queue import DeviceQueue
from avatar.settings import VaeSettings, load
from avatar.vae import vae
from services.process import run
from services.vae.service import VaeServicer
from services.worker import device_and_dtype, naming_setting, worker_process

logger = logging.getLogger(__name__)


def build(settings: VaeSettings, queue: DeviceQueue) -> VaeServicer:
    """Build the service over the checkpoint's VAE, and warm it up for all sizes that it serves."""
    part = open_part(settings.checkpoint, "vae", decoder=settings.decoder)
    if part.decoder is not None:
        latents = part.decoder.config.get("latents")
        logger.info("a tiny decoder decodes", extra={"decoder": str(part.decoder.folder), "latents": latents})
    device, dtype = device_and_dtype(settings)
    model = vae.load(part, device=device, dtype=dtype)
    with naming_setting("sizes"):
        model.limit_sizes(settings.video_sizes())
    servicer = VaeServicer(model, part.digest(), queue, settings.capacity)
    queue.submit(servicer.warm).result()
    return servicer


async def main() -> None:
    settings = load(VaeSettings, os.environ)
    async with worker_process("vae", settings) as worker, worker.serving(build(settings, worker.queue)):
        await until_stopped()


if __name__ == "__main__":
    run(main)
