"""The text worker's process: `python -m services.text`."""

import os

from avatar.checkpoints.layouts import open_part
from avatar.rpc.server import until_stopped
from avatar.runtime.device_queue import DeviceQueue
from avatar.settings import TextSettings, load
from avatar.store.sessions import SessionStore
from avatar.text import model
from services.process import run
from services.text.service import TextServicer
from services.worker import device_and_dtype, worker_process


def build(settings: TextSettings, store: SessionStore, queue: DeviceQueue) -> TextServicer:
    """Build the service over the checkpoint's text encoder, and warm it up. ValueError if the checkpoint has none."""
    part = open_part(settings.checkpoint, "text")
    device, dtype = device_and_dtype(settings)
    text = model.load(part, device=device, dtype=dtype)
    queue.submit(text.warm).result()
    return TextServicer(text, part.digest(), store, queue, settings.capacity, settings.embedding_ttl_s)


async def main() -> None:
    settings = load(TextSettings, os.environ)
    async with (
        worker_process("text", settings) as worker,
        worker.serving(build(settings, worker.store, worker.queue)),
    ):
        await until_stopped()


if __name__ == "__main__":
    run(main)
