"""A suite of processes for fault injection: two workers for each stage, two gateways, all behind proxies, and Redis."""

import asyncio
import sys
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc.aio
import psutil
from redis.asyncio import Redis

from services.local.processes import Suite, free_ports, start_redis, until_healthy
from tests.proxy import Proxy, proxied
from tests.services.local.test_launch import active_streams
from tests.services.voice.fakes import command

WORKERS = {stage: (f"{stage}-0", f"{stage}-1") for stage in ("audio", "denoiser", "vae", "voice")}
GATEWAYS = ("gateway-0", "gateway-1")
REDIS = "redis"
# A draining process ends its streams after a second. The stall timeout is long, so that a worker of a busy machine does
# not count as lost; health checks detect a frozen one after three seconds. One worker has room for all streams of the
# tests, and for so few that a fault can fill it.
GATEWAY = {"AVATAR_DRAIN_S": "1", "AVATAR_STALL_S": "20"}
WORKER = {"AVATAR_DRAIN_S": "1", "AVATAR_CAPACITY": "12"}
LEFT_S = 30.0


@dataclass
class ChaosSuite:
    """A running suite that survives the loss of any one process.

    proxies: by worker and gateway; gateways and clients connect through them. fillers: streams that fill the workers.
    pids: of every process that was ever started.
    """

    checkpoint: Path
    suite: Suite
    proxies: dict[str, Proxy] = field(default_factory=dict)
    fillers: AsyncExitStack = field(default_factory=AsyncExitStack)
    pids: set[int] = field(default_factory=set)

    @property
    def target(self) -> str:
        """Both gateways as one address: a client falls back to the second."""
        return "ipv4:" + ",".join(self.proxies[name].target for name in GATEWAYS)

    @property
    def voice_command(self) -> str:
        """The command that speaks at the voice workers."""
        return command(self.suite.folder)

    async def start(self, name: str) -> None:
        """Start a process. The log of an earlier one of this name is kept under its process id."""
        service = name.partition("-")[0]
        if former := self.suite.processes.get(name):
            self.suite.log_of(name).rename(self.suite.log_of(f"{name}.{former.pid}"))
        if service == REDIS:
            await start_redis(self.suite, int(self.suite.redis_url.rpartition(":")[2]))
        else:
            program = (sys.executable, "-m", f"services.{service}")
            await self.suite.start(name, *program, **self._environment(name))
        self.pids.add(self.suite.processes[name].pid)

    async def until_healthy(self, *services: str) -> None:
        """Wait until all processes, or those of the given services, are healthy."""
        targets = self.suite.targets
        needed = {name: at for name, at in targets.items() if not services or name.startswith(services)}
        await until_healthy(replace(self.suite, targets=needed))

    async def active(self) -> dict[str, int]:
        """Return the number of open streams at each worker that answers."""
        found: dict[str, int] = {}
        for name in (worker for workers in WORKERS.values() for worker in workers):
            with suppress(grpc.aio.AioRpcError):
                found |= await active_streams(replace(self.suite, targets={name: self.suite.targets[name]}))
        return found

    def gateways_in_use(self) -> set[str]:
        """Return the gateways that this process, with its proxies, is connected to."""
        ports = {self.suite.targets[name].rpartition(":")[2]: name for name in GATEWAYS}
        remote = [each.raddr.port for each in psutil.Process().net_connections("tcp") if each.status == "ESTABLISHED"]
        return {ports[str(port)] for port in remote if str(port) in ports}

    async def until_idle(self) -> None:
        """Wait until no stream is open and the store has no session. TimeoutError names what remains."""
        left: object = None
        try:
            async with asyncio.timeout(LEFT_S):
                while left := {**await self.active(), "keys": await self._keys()}:
                    if not any(left.values()):
                        return
                    await asyncio.sleep(0.1)
        except TimeoutError as error:
            raise TimeoutError(f"left over: {left}") from error

    def memory_bytes(self) -> dict[str, int]:
        """Return the resident memory of every running process."""
        return {name: psutil.Process(each.pid).memory_info().rss for name, each in self.suite.processes.items()}

    async def _keys(self) -> list[bytes]:
        """Return the store's keys of sessions, but for the marks of those that were deleted."""
        async with Redis.from_url(self.suite.redis_url, socket_timeout=1.0) as redis:
            return [key for kind in ("session", "claim") async for key in redis.scan_iter(f"avatar:{kind}:*")]

    def _environment(self, name: str) -> dict[str, str]:
        """Return the settings of a worker or a gateway."""
        own = {"AVATAR_LISTEN": self.suite.targets[name], "AVATAR_REDIS_URL": self.suite.redis_url}
        if name not in GATEWAYS:
            voice = {"AVATAR_VOICE_COMMAND": self.voice_command} if name in WORKERS["voice"] else {}
            return {**own, "AVATAR_CHECKPOINT": str(self.checkpoint.absolute()), **WORKER, **voice}
        through = {stage: ",".join(self.proxies[worker].target for worker in WORKERS[stage]) for stage in WORKERS}
        return {
            **own,
            "AVATAR_AUDIO": through["audio"],
            "AVATAR_DENOISERS": through["denoiser"],
            "AVATAR_VAE": through["vae"],
            "AVATAR_VOICE": through["voice"],
            **GATEWAY,
        }


@asynccontextmanager
async def chaos_suite(checkpoint: Path, folder: Path) -> AsyncGenerator[ChaosSuite, None]:
    """Run such a suite while the body runs; its logs go to `folder`."""
    workers = [name for names in WORKERS.values() for name in names]
    names = [*workers, *GATEWAYS]
    folder.mkdir(parents=True, exist_ok=True)
    redis_port, *ports = free_ports(1 + len(names))
    targets = {name: f"127.0.0.1:{port}" for name, port in zip(names, ports, strict=True)}
    chaos = ChaosSuite(checkpoint, Suite(folder, f"redis://127.0.0.1:{redis_port}", targets))
    async with AsyncExitStack() as stack:
        for name in names:
            chaos.proxies[name] = await stack.enter_async_context(proxied(targets[name]))
        stack.push_async_callback(chaos.suite.stop)
        for name in (REDIS, *names):
            await chaos.start(name)
        await chaos.until_healthy()
        yield chaos
