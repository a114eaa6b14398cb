"""Launch a checkpoint's suite as processes of this machine, for the demo and the tests: Redis and one per service.

async with launched(checkpoint, folder) as suite:
    ...  # suite.gateway serves
"""

import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from avatar.checkpoints.layouts import has_text_encoder, open_part
from avatar.denoiser.config import NetworkConfig
from services.local.processes import Suite, free_ports, start_redis, until_healthy


@asynccontextmanager
async def launched(
    checkpoint: Path,
    folder: Path,
    *,
    levels: int | None = None,
    redis_url: str | None = None,
    voice: dict[str, str] | None = None,
    report: Callable[[str], object] = lambda _: None,
) -> AsyncGenerator[Suite, None]:
    """Run all services on free ports of the loopback interface while the body runs; yield them when they are healthy.

    One denoiser per level, and a text worker if the checkpoint has a text encoder. levels: how many of those that the
    checkpoint was trained for; None: all. redis_url: of a server to use; without it, one is started. voice:
    settings of a voice worker; none without it. folder: of the
    processes' output. report: called with the name of each process once it is healthy. ValueError if the checkpoint has
    fewer levels; RuntimeError, with the end of its output, if a process ends or does not become healthy.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = NetworkConfig.from_dict(open_part(checkpoint, "denoiser").config).with_levels(levels)
    text = ["text"] if has_text_encoder(checkpoint) else []
    names = ["audio", *(f"denoiser-{level}" for level in range(config.num_levels)), "vae", *text, "gateway"]
    if voice:
        names.insert(-1, "voice")
    redis_port, *ports = free_ports(1 + len(names))
    targets = {name: f"127.0.0.1:{port}" for name, port in zip(names, ports, strict=True)}
    async with Suite(folder, redis_url or f"redis://127.0.0.1:{redis_port}", targets) as suite:
        if redis_url is None:
            await start_redis(suite, redis_port)
        for name in names:
            service, _, level = name.partition("-")
            settings = {"AVATAR_LISTEN": targets[name], "AVATAR_REDIS_URL": suite.redis_url}
            settings["AVATAR_SCHEDULE"] = "" if levels is None else str(levels)
            if name == "gateway":
                settings |= _worker_addresses(targets)
            elif name == "voice":
                settings |= voice or {}
            else:
                settings |= {"AVATAR_CHECKPOINT": str(checkpoint.absolute()), "AVATAR_LEVELS": level or "0"}
            await suite.start(name, sys.executable, "-m", f"services.{service}", **settings)
        await until_healthy(suite, report)
        yield suite


def _worker_addresses(targets: dict[str, str]) -> dict[str, str]:
    """Return the settings of a gateway that say where its workers are."""
    return {
        "AVATAR_AUDIO": targets["audio"],
        "AVATAR_DENOISERS": ",".join(target for name, target in targets.items() if name.startswith("denoiser")),
        "AVATAR_VAE": targets["vae"],
        "AVATAR_TEXT": targets.get("text", ""),
        "AVATAR_VOICE": targets.get("voice", ""),
    }
