"""The real gateway and Redis over stand-in workers, each a process of this machine."""

import sys
import tempfile
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType

from benchmarks.standin.content import PUBLIC, Content
from services.local.processes import Suite, free_ports, start_redis, until_healthy

# Step of the audio stage, where a level takes tens of milliseconds.
AUDIO_STEP_S = 0.001


def stages_of(content: Content) -> Sequence[str]:
    """Return the names of the stages: an audio stage, a denoiser for each level, and a decoder."""
    return ("audio", *(f"denoiser-{level}" for level in range(content.num_levels)), "vae")


STAGES = stages_of(PUBLIC)


@asynccontextmanager
async def standin_suite(
    step_s: float,
    *,
    workers: int = 1,
    environment: Mapping[str, str] = MappingProxyType({}),
    content: Content = PUBLIC,
    lookahead_s: float = 0.0,
) -> AsyncGenerator[Suite, None]:
    """Run a suite whose levels and decoder take `step_s` seconds per block, while the body runs.

    workers: number per stage; they are named `audio`, or `audio.0`, `audio.1` ... if there are several. environment:
    additional variables of all processes but Redis. content: sizes of blocks, and the number of levels.
    lookahead_s: seconds of audio after a block that its features wait for.
    """
    with tempfile.TemporaryDirectory(prefix="avatar-bench-") as folder:
        stages = stages_of(content)
        names = [name for stage in stages for name in workers_of(stage, workers)]
        redis_port, *ports = free_ports(2 + len(names))
        targets = {name: f"127.0.0.1:{port}" for name, port in zip([*names, "gateway"], ports, strict=True)}
        suite = Suite(Path(folder), f"redis://127.0.0.1:{redis_port}", targets)
        try:
            await start_redis(suite, redis_port)
            for name in names:
                await start_worker(suite, name, step_s, environment, content, lookahead_s)
            program = [sys.executable, "-m", "services.gateway"]
            await suite.start("gateway", *program, **_gateway(suite, workers, stages), **environment)
            await until_healthy(suite)
            yield suite
        finally:
            await suite.stop()


async def start_worker(
    suite: Suite,
    name: str,
    step_s: float,
    environment: Mapping[str, str] = MappingProxyType({}),
    content: Content = PUBLIC,
    lookahead_s: float = 0.0,
) -> None:
    """Start the worker of this name at its address."""
    stage, _, level = name.partition(".")[0].partition("-")
    step = AUDIO_STEP_S if stage == "audio" else step_s
    program = ["-m", "benchmarks.standin", stage, "--listen", suite.targets[name], "--step-s", str(min(step, step_s))]
    program += ["--level", level or "0", "--levels", str(content.num_levels)]
    program += ["--block-latents", str(content.block_latents), "--lookahead-s", str(lookahead_s)]
    await suite.start(name, sys.executable, *program, AVATAR_LOG_LEVEL="WARNING", **environment)


def workers_of(stage: str, workers: int) -> list[str]:
    """Return the names of a stage's workers."""
    return [stage] if workers == 1 else [f"{stage}.{number}" for number in range(workers)]


def _gateway(suite: Suite, workers: int, stages: Sequence[str]) -> dict[str, str]:
    def addresses(*stages: str) -> str:
        return ",".join(suite.targets[name] for stage in stages for name in workers_of(stage, workers))

    return {
        "AVATAR_LISTEN": suite.gateway,
        "AVATAR_REDIS_URL": suite.redis_url,
        "AVATAR_AUDIO": addresses("audio"),
        "AVATAR_DENOISERS": addresses(*stages[1:-1]),
        "AVATAR_VAE": addresses("vae"),
        "AVATAR_LOG_LEVEL": "WARNING",
    }
