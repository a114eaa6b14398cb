"""The audio worker's process: `python -m services.audio`."""

import os

import torch

from avatar import telemetry
from avatar.audio.model import load
from avatar.checkpoints.layouts import open_part
from avatar.rpc.server import serving, until_stopped
from avatar.rpc.tls import server_credentials
from avatar.runtime.device_queue import DeviceQueue
from avatar.settings import AudioSettings
from avatar.settings import load as load_settings
from services.audio.service import AudioServicer
from services.compute import device_and_dtype, open_device_queue
from services.process import run


def build(settings: AudioSettings, queue: DeviceQueue) -> AudioServicer:
    """The service over the checkpoint's audio encoder."""
    part = open_part(settings.checkpoint, "audio")
    device, dtype = device_and_dtype(settings)
    audio = load(part, device=device, dtype=dtype)
    servicer = AudioServicer(audio, part.config["encoder"], part.digest(), queue, settings.capacity)
    queue.submit(servicer.warm).result()
    return servicer


async def main() -> None:
    settings = load_settings(AudioSettings, os.environ)
    telemetry.set_up("avatar-audio", settings.log_level)
    credentials = server_credentials(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    torch.set_num_threads(settings.threads)
    with open_device_queue(settings) as queue:
        servicer = build(settings, queue)
        async with serving(settings.listen, servicer, drain_s=settings.drain_s, credentials=credentials):
            await until_stopped()


if __name__ == "__main__":
    run(main)
