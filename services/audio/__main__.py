"""The audio worker's process: `python -m services.audio`."""

import os

import torch

from avatar import telemetry
from avatar.audio.model import load
from avatar.checkpoints.layouts import open_part
from avatar.rpc.server import serving, until_stopped
from avatar.rpc.tls import server_credentials
from avatar.runtime.device_queue import Device
from avatar.settings import AudioSettings
from avatar.settings import load as load_settings
from services.audio.service import AudioServicer
from services.compute import device_and_dtype, device_of
from services.process import run


def build(settings: AudioSettings, device: Device) -> AudioServicer:
    """The service over the checkpoint's audio encoder."""
    part = open_part(settings.checkpoint, "audio")
    where, dtype = device_and_dtype(settings)
    audio = load(part, device=where, dtype=dtype)
    servicer = AudioServicer(audio, part.config["encoder"], part.digest(), device, settings.capacity)
    device.submit(servicer.warm).result()
    return servicer


async def main() -> None:
    settings = load_settings(AudioSettings, os.environ)
    telemetry.set_up("avatar-audio", settings.log_level)
    credentials = server_credentials(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    torch.set_num_threads(settings.threads)
    with device_of(settings) as device:
        servicer = build(settings, device)
        async with serving(settings.listen, servicer, drain_s=settings.drain_s, credentials=credentials):
            await until_stopped()


if __name__ == "__main__":
    run(main)
