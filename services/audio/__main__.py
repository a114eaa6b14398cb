"""The audio worker's process: `python -m services.audio`."""

import os
from functools import partial

from avatar.audio import model
from avatar.checkpoints.layouts import listens, open_part
from avatar.rpc.server import until_stopped
from avatar.runtime.device_queue import DeviceQueue
from avatar.settings import AudioSettings, load
from services.audio.service import AudioServicer
from services.process import run
from services.worker import usable_device, worker_process


def build(settings: AudioSettings, queue: DeviceQueue) -> AudioServicer:
    """Build the service over the checkpoint's audio encoder, and warm it up."""
    part = open_part(settings.checkpoint, "audio")
    # In float32, whatever the setting: in bfloat16 features differ by 2 to 3 % a layer.
    audio = model.load(part, device=usable_device(settings))
    servicer = AudioServicer(audio, part.config["encoder"], part.digest(), queue, settings.capacity)
    queue.submit(partial(servicer.warm, listens=listens(settings.checkpoint))).result()
    return servicer


async def main() -> None:
    settings = load(AudioSettings, os.environ)
    async with worker_process("audio", settings) as worker, worker.serving(build(settings, worker.queue)):
        await until_stopped()


if __name__ == "__main__":
    run(main)
