"""The text worker's process: `python -m services.text`."""

import os

import torch

from avatar import telemetry
from avatar.checkpoints.layouts import open_part
from avatar.rpc.server import serving, until_stopped
from avatar.rpc.tls import server_credentials
from avatar.runtime.device_queue import DeviceQueue
from avatar.settings import TextSettings
from avatar.settings import load as load_settings
from avatar.store.redis import RedisHashes
from avatar.store.sessions import SessionStore
from avatar.text.model import load
from services.compute import device_and_dtype, open_device_queue
from services.process import run
from services.text.service import TextServicer


def build(settings: TextSettings, store: SessionStore, queue: DeviceQueue) -> TextServicer:
    """The service over the checkpoint's text encoder. ValueError if the checkpoint knows no text."""
    part = open_part(settings.checkpoint, "text")
    device, dtype = device_and_dtype(settings)
    text = load(part, device=device, dtype=dtype)
    return TextServicer(text, part.digest(), store, queue, settings.capacity, settings.embedding_ttl_s)


async def main() -> None:
    settings = load_settings(TextSettings, os.environ)
    telemetry.set_up("avatar-text", settings.log_level)
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
