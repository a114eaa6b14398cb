"""A denoiser's process: `python -m services.denoiser`."""

import asyncio
import os
from contextlib import AsyncExitStack

import torch

from avatar import telemetry
from avatar.aio import background
from avatar.checkpoints.layouts import open_part
from avatar.checkpoints.lora import LoraAdapter
from avatar.denoiser import speed
from avatar.denoiser.denoiser import Denoiser
from avatar.denoiser.model import load
from avatar.handoff.chain import Chain, joined
from avatar.rpc.server import serving, until_stopped
from avatar.rpc.tls import server_credentials
from avatar.runtime.device_queue import DeviceQueue
from avatar.settings import PREFIX, DenoiserSettings
from avatar.settings import load as load_settings
from avatar.store.redis import RedisHashes
from avatar.store.sessions import SessionStore
from services.compute import device_and_dtype, naming, open_device_queue
from services.denoiser.service import DenoiserServicer
from services.process import run

# Pixels on a side of one latent, whatever the codec.
SPACE_STRIDE = 8


def build(settings: DenoiserSettings, store: SessionStore, queue: DeviceQueue) -> DenoiserServicer:
    """The service over the checkpoint's network, warm for the settings' sizes; all its levels share the weights."""
    adapter = LoraAdapter(settings.adapter, settings.adapter_alpha) if settings.adapter else None
    part = open_part(settings.checkpoint, "denoiser", adapter)
    device, dtype = device_and_dtype(settings)
    network, config = load(part, device=device, dtype=dtype)
    sizes = latent_sizes(settings)
    with naming("attention"):
        attention = speed.attention_kernel(settings.attention, network)
    if settings.float8:
        with naming("float8"):
            speed.use_float8(network)
    if settings.compile:
        speed.compile_layers(network)
    levels = settings.served(config.num_levels)
    served = sizes if settings.compile else None
    denoisers = {level: Denoiser(network, config, level, sizes=served, attention=attention) for level in levels}
    servicer = DenoiserServicer(denoisers, part.digest(), store, queue, settings.capacity)
    with naming("sizes"):
        for size in sizes:
            queue.submit(servicer.warm, *size).result()
    return servicer


def latent_sizes(settings: DenoiserSettings) -> list[tuple[int, int]]:
    """Heights and widths in latents of the sizes to be warm for.

    ValueError if the settings name none where code is compiled, and the checkpoint does not fix one.
    """
    pictures = settings.pictures()
    if not pictures and (settings.checkpoint / "vae").is_dir():
        rule = open_part(settings.checkpoint, "vae").config.get("picture", {})
        pictures = [(rule["width"], rule["height"])] if rule.get("width") and rule.get("height") else []
    if settings.compile and not pictures:
        raise ValueError(f"{PREFIX}COMPILE needs {PREFIX}SIZES: this checkpoint leaves the size of its videos open")
    if odd := [f"{width}x{height}" for width, height in pictures if width % SPACE_STRIDE or height % SPACE_STRIDE]:
        raise ValueError(f"{PREFIX}SIZES names {odd[0]}, expected multiples of {SPACE_STRIDE}")
    return [(height // SPACE_STRIDE, width // SPACE_STRIDE) for width, height in pictures]


async def main() -> None:
    settings = load_settings(DenoiserSettings, os.environ)
    telemetry.set_up("avatar-denoiser", settings.log_level)
    credentials = server_credentials(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    torch.set_num_threads(settings.threads)
    store = SessionStore(RedisHashes(settings.redis_url))
    async with AsyncExitStack() as stack:
        stack.push_async_callback(store.aclose)
        servicer = build(settings, store, stack.enter_context(open_device_queue(settings)))
        if settings.chain:
            with naming("chain"):
                servicer.chain = await stack.enter_async_context(joined(settings.chain, servicer.seat))
        server = serving(settings.listen, servicer, drain_s=settings.drain_s, credentials=credentials)
        await stack.enter_async_context(server)
        await until_over(servicer.chain)


async def until_over(chain: Chain | None) -> None:
    """Wait for SIGTERM or SIGINT. StageLost if the chain breaks first: it is made anew by processes that are new."""
    if chain is None:
        await until_stopped()
        return
    async with background(until_stopped()) as stopping, background(chain.until_lost()) as losing:
        await asyncio.wait({stopping, losing}, return_when=asyncio.FIRST_COMPLETED)
        if not stopping.done():
            chain.check()


if __name__ == "__main__":
    run(main)
