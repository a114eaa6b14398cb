"""The VAE worker's process: `python -m services.vae`."""

import os

import torch

from avatar import telemetry
from avatar.checkpoints.layouts import open_part
from avatar.rpc.server import serving, until_stopped
from avatar.rpc.tls import server_credentials
from avatar.runtime.device_queue import DeviceQueue
from avatar.settings import VaeSettings
from avatar.settings import load as load_settings
from avatar.store.redis import RedisHashes
from avatar.store.sessions import SessionStore
from avatar.vae.vae import load
from services.compute import device_and_dtype, open_device_queue
from services.process import run
from services.vae.service import VaeServicer


def build(settings: VaeSettings, store: SessionStore, queue: DeviceQueue) -> VaeServicer:
    """The service over the checkpoint's codec."""
    part = open_part(settings.checkpoint, "vae")
    device, dtype = device_and_dtype(settings)
    vae = load(part, device=device, dtype=dtype)
    servicer = VaeServicer(vae, part.digest(), store, queue, settings.capacity)
    queue.submit(servicer.warm).result()
    return servicer


async def main() -> None:
    settings = load_settings(VaeSettings, os.environ)
    telemetry.set_up("avatar-vae", settings.log_level)
    credentials = server_credentials(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    torch.set_num_threads(settings.threads)
    store = SessionStore(RedisHashes(settings.redis_url))
    with open_device_queue(settings) as queue:
        servicer = build(settings, store, queue)
        async with serving(settings.listen, servicer, drain_s=settings.drain_s, credentials=credentials):
            await until_stopped()
    await store.aclose()


if __name__ == "__main__":
    run(main)
