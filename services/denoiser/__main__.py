"""A denoiser's process: `python -m services.denoiser`."""

import os
from concurrent.futures import ThreadPoolExecutor

import torch

from avatar import telemetry
from avatar.adapter import Adapter
from avatar.denoiser.denoiser import Denoiser
from avatar.denoiser.model import load
from avatar.layouts import open_part
from avatar.rpc.server import serving, until_stopped
from avatar.session import RedisHashes, SessionStore
from avatar.settings import DenoiserSettings
from avatar.settings import load as load_settings
from services.denoiser.service import DenoiserServicer
from services.process import run


def build(settings: DenoiserSettings, store: SessionStore, executor: ThreadPoolExecutor) -> DenoiserServicer:
    """The service over the checkpoint's network; all its levels share the weights."""
    adapter = Adapter(settings.adapter, settings.adapter_alpha) if settings.adapter else None
    part = open_part(settings.checkpoint, "denoiser", adapter)
    network, config = load(part)
    denoisers = {level: Denoiser(network, config, level) for level in settings.served(config.num_levels)}
    return DenoiserServicer(denoisers, part.digest(), store, executor, settings.capacity)


async def main() -> None:
    settings = load_settings(DenoiserSettings, os.environ)
    telemetry.set_up("avatar-denoiser", settings.log_level)
    torch.set_num_threads(settings.threads)
    store = SessionStore(RedisHashes(settings.redis_url))
    with ThreadPoolExecutor(1, "device") as executor:
        async with serving(settings.listen, build(settings, store, executor), drain_s=settings.drain_s):
            await until_stopped()
    await store.aclose()


if __name__ == "__main__":
    run(main)
