"""All services in one process, for development: `python -m services`.

The gateway listens at AVATAR_LISTEN (127.0.0.1:7000), the workers at free ports of the loopback interface. The workers
share one device queue, AVATAR_DEVICE, AVATAR_DTYPE and AVATAR_SIZES. AVATAR_REDIS_URL names a Redis server to use;
without it, one is started on a free port and ends with this process. With AVATAR_VOICE_URL or AVATAR_VOICE_COMMAND,
clients may send text.
"""

import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from avatar import telemetry
from avatar.checkpoints.layouts import has_text_encoder
from avatar.rpc.server import serving, until_stopped
from avatar.rpc.tls import server_credentials
from avatar.settings import (
    AudioSettings,
    DenoiserSettings,
    GatewaySettings,
    TextSettings,
    VaeSettings,
    VoiceSettings,
    load,
)
from avatar.store.redis import RedisHashes
from avatar.store.sessions import SessionStore
from services.audio.__main__ import build as build_audio
from services.denoiser.__main__ import build as build_denoiser
from services.gateway.__main__ import gateway as serving_gateway
from services.local.processes import local_redis
from services.registration import WorkerServicer, registered
from services.text.__main__ import build as build_text
from services.vae.__main__ import build as build_vae
from services.voice.__main__ import open_voice
from services.worker import open_device_queue

ANY_PORT = "127.0.0.1:0"


@asynccontextmanager
async def workers(
    checkpoint: Path,
    store: SessionStore,
    settings: GatewaySettings,
    *,
    denoisers: Sequence[str] = ("all",),
    adapter: Path | None = None,
    adapter_alpha: float | None = None,
    decoder: Path | None = None,
    voice: VoiceSettings | None = None,
    **worker: Any,
) -> AsyncGenerator[GatewaySettings, None]:
    """Run the workers of one checkpoint while the body runs; yield a gateway's settings with their addresses.

    denoisers: the levels of each denoiser, within the gateway's schedule if it has one. adapter: of every denoiser.
    decoder: of the VAE. voice: of the voice worker, if there is to be one. worker: further settings of all workers.
    """
    async with AsyncExitStack() as stack:
        audio_settings = AudioSettings(checkpoint=checkpoint, **worker)
        queue = stack.enter_context(open_device_queue(audio_settings))

        async def serve(servicer: WorkerServicer) -> str:
            tls = audio_settings
            credentials = server_credentials(tls.tls_cert, tls.tls_key, tls.tls_client_ca)
            port = await stack.enter_async_context(serving(ANY_PORT, servicer, credentials=credentials))
            target = f"127.0.0.1:{port}"
            await stack.enter_async_context(registered(store.workers(settings.cell), target, servicer))
            return target

        # All are built before one serves: a model is loaded and warmed on the event loop, where everything else waits.
        built: list[tuple[str, WorkerServicer]] = [
            ("audio", build_audio(audio_settings, queue)),
            ("vae", build_vae(VaeSettings(checkpoint=checkpoint, decoder=decoder, **worker), queue)),
        ]
        merged = {"adapter": adapter, "adapter_alpha": adapter_alpha, "schedule": settings.schedule, **worker}
        for levels in denoisers:
            given = DenoiserSettings(checkpoint=checkpoint, levels=levels, **merged)
            built.append(("denoisers", build_denoiser(given, store, queue)))
        if has_text_encoder(checkpoint):
            built.append(("text", build_text(TextSettings(checkpoint=checkpoint, **worker), store, queue)))
        if voice:
            built.append(("voice", await stack.enter_async_context(open_voice(voice))))
        targets: dict[str, Any] = {}
        for stage, servicer in built:
            targets[stage] = (*targets.get(stage, ()), await serve(servicer))
        yield settings.model_copy(update=targets)


@asynccontextmanager
async def gateway(store: SessionStore, settings: GatewaySettings) -> AsyncGenerator[str, None]:
    """Run a gateway while the body runs; yield its HOST:PORT."""
    async with serving_gateway(settings, store) as port:
        yield f"127.0.0.1:{port}"


@asynccontextmanager
async def suite(
    checkpoint: Path, store: SessionStore, settings: GatewaySettings, **worker: Any
) -> AsyncGenerator[str, None]:
    """Run all services of a checkpoint while the body runs; yield the gateway's HOST:PORT. worker: as of `workers`."""
    async with workers(checkpoint, store, settings, **worker) as given, gateway(store, given) as target:
        yield target


async def main() -> None:
    settings = load(GatewaySettings, os.environ)
    telemetry.set_up("avatar", settings.log_level)
    torch.set_num_threads(1)
    models = load(DenoiserSettings, os.environ)
    names = ("adapter", "adapter_alpha", "device", "dtype", "memory_gb", "sizes")
    switches = {name: getattr(models, name) for name in names}
    async with AsyncExitStack() as stack:
        if "AVATAR_REDIS_URL" not in os.environ:
            folder = stack.enter_context(TemporaryDirectory(prefix="avatar-redis-"))
            url = await stack.enter_async_context(local_redis(Path(folder)))
            settings = settings.model_copy(update={"redis_url": url})
        store = SessionStore(RedisHashes(settings.redis_url))
        stack.push_async_callback(store.aclose)
        switches["decoder"] = load(VaeSettings, os.environ).decoder
        voice = load(VoiceSettings, os.environ)
        switches["voice"] = voice if voice.voice_url or voice.voice_command else None
        target = await stack.enter_async_context(suite(models.checkpoint, store, settings, **switches))
        print(f"ready at {target}", flush=True)
        await until_stopped()
