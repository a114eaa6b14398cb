"""All services in one process, for development: `python -m services`.

The gateway listens where AVATAR_LISTEN says (127.0.0.1:7000); the workers take free ports of the loopback interface and
share one device thread, AVATAR_DEVICE and AVATAR_DTYPE. Sessions are kept in this process unless AVATAR_REDIS_URL names
a server.
"""

import os
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from avatar import telemetry
from avatar.adapter import ALPHA
from avatar.layouts import knows_text
from avatar.rpc.server import Servicer, serving, until_stopped
from avatar.session import MemoryHashes, RedisHashes, SessionStore
from avatar.settings import (
    AudioSettings,
    DenoiserSettings,
    GatewaySettings,
    TextSettings,
    VaeSettings,
    WorkerSettings,
    load,
)
from avatar.tally import MemoryTally, RedisTally, Tally
from avatar.tls import server_credentials
from services.audio.__main__ import build as build_audio
from services.denoiser.__main__ import build as build_denoiser
from services.gateway.__main__ import gateway
from services.process import run
from services.text.__main__ import build as build_text
from services.vae.__main__ import build as build_vae

ANY_PORT = "127.0.0.1:0"


@asynccontextmanager
async def suite(
    checkpoint: Path,
    store: SessionStore,
    settings: GatewaySettings,
    *,
    tally: Tally | None = None,
    denoisers: Sequence[str] = ("all",),
    adapter: Path | None = None,
    adapter_alpha: float = ALPHA,
    **worker: Any,
) -> AsyncGenerator[str, None]:
    """All services over one checkpoint and one device thread while the body runs; gives the gateway's HOST:PORT.

    tally: of what tenants use; kept in this process without one. denoisers: the levels of each denoiser, in order.
    worker: further settings of all workers.
    """
    async with AsyncExitStack() as stack:

        async def served(servicer: Servicer) -> str:
            credentials = server_credentials(WorkerSettings(listen=ANY_PORT, **worker))
            port = await stack.enter_async_context(serving(ANY_PORT, servicer, credentials=credentials))
            return f"127.0.0.1:{port}"

        executor = stack.enter_context(ThreadPoolExecutor(1, "device"))
        audio = build_audio(AudioSettings(checkpoint=checkpoint, **worker), executor)
        vae = build_vae(VaeSettings(checkpoint=checkpoint, **worker), store, executor)
        addresses: list[str] = []
        for levels in denoisers:
            level_settings = DenoiserSettings(
                checkpoint=checkpoint, levels=levels, adapter=adapter, adapter_alpha=adapter_alpha, **worker
            )
            denoiser = build_denoiser(level_settings, store, executor)
            addresses += [await served(denoiser)] * len(denoiser.levels)
        text_target = ""
        if knows_text(checkpoint):
            text = build_text(TextSettings(checkpoint=checkpoint, **worker), store, executor)
            text_target = await served(text)
        given = replace(
            settings,
            audio=await served(audio),
            denoisers=tuple(addresses),
            vae=await served(vae),
            text=text_target,
        )
        port = await stack.enter_async_context(gateway(given, store, tally or MemoryTally()))
        yield f"127.0.0.1:{port}"


async def main() -> None:
    settings = load(GatewaySettings, os.environ)
    telemetry.set_up("avatar", settings.log_level)
    torch.set_num_threads(1)
    models = load(DenoiserSettings, os.environ)
    is_kept = "AVATAR_REDIS_URL" in os.environ
    store = SessionStore(RedisHashes(settings.redis_url) if is_kept else MemoryHashes())
    tally = RedisTally(settings.redis_url) if is_kept else MemoryTally()
    switches = {name: getattr(models, name) for name in ("adapter", "adapter_alpha", "device", "dtype")}
    async with suite(models.checkpoint, store, settings, tally=tally, **switches):
        await until_stopped()
    await tally.aclose()
    await store.aclose()


if __name__ == "__main__":
    run(main)
