"""The audio worker's process: `python -m services.audio`."""

import os
from concurrent.futures import ThreadPoolExecutor

import torch

from avatar import telemetry
from avatar.audio.model import load
from avatar.layouts import open_part
from avatar.rpc.server import serving, until_stopped
from avatar.settings import AudioSettings
from avatar.settings import load as load_settings
from avatar.tls import server_credentials
from services.audio.service import AudioServicer
from services.device import device_and_dtype
from services.process import run


def build(settings: AudioSettings, executor: ThreadPoolExecutor) -> AudioServicer:
    """The service over the checkpoint's audio encoder."""
    part = open_part(settings.checkpoint, "audio")
    device, dtype = device_and_dtype(settings)
    audio = load(part, device=device, dtype=dtype)
    servicer = AudioServicer(audio, part.config["encoder"], part.digest(), executor, settings.capacity)
    executor.submit(servicer.warm).result()
    return servicer


async def main() -> None:
    settings = load_settings(AudioSettings, os.environ)
    telemetry.set_up("avatar-audio", settings.log_level)
    credentials = server_credentials(settings)
    torch.set_num_threads(settings.threads)
    with ThreadPoolExecutor(1, "device") as executor:
        servicer = build(settings, executor)
        async with serving(settings.listen, servicer, drain_s=settings.drain_s, credentials=credentials):
            await until_stopped()


if __name__ == "__main__":
    run(main)
