"""The VAE worker's process: `python -m services.vae`."""

import os
from concurrent.futures import ThreadPoolExecutor

import torch

from avatar import telemetry
from avatar.layouts import open_part
from avatar.rpc.server import serving, until_stopped
from avatar.session import RedisHashes, SessionStore
from avatar.settings import VaeSettings
from avatar.settings import load as load_settings
from avatar.tls import server_credentials
from avatar.vae.vae import load
from services.device import device_and_dtype
from services.process import run
from services.vae.service import VaeServicer


def build(settings: VaeSettings, store: SessionStore, executor: ThreadPoolExecutor) -> VaeServicer:
    """The service over the checkpoint's codec."""
    part = open_part(settings.checkpoint, "vae")
    device, dtype = device_and_dtype(settings)
    vae = load(part, device=device, dtype=dtype)
    servicer = VaeServicer(vae, part.digest(), store, executor, settings.capacity)
    executor.submit(servicer.warm).result()
    return servicer


async def main() -> None:
    settings = load_settings(VaeSettings, os.environ)
    telemetry.set_up("avatar-vae", settings.log_level)
    credentials = server_credentials(settings)
    torch.set_num_threads(settings.threads)
    store = SessionStore(RedisHashes(settings.redis_url))
    with ThreadPoolExecutor(1, "device") as executor:
        servicer = build(settings, store, executor)
        async with serving(settings.listen, servicer, drain_s=settings.drain_s, credentials=credentials):
            await until_stopped()
    await store.aclose()


if __name__ == "__main__":
    run(main)
