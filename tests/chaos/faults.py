"""Kinds of faults. Each has a function that injects it into a process, and one that ends it."""

import asyncio
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TypeAlias

import grpc.aio

from avatar.aio import background
from avatar.v1 import avatar_service_pb2 as pb
from tests.chaos.attacks import ATTACKS
from tests.chaos.suite import GATEWAYS, WORKERS, ChaosSuite
from tests.conftest import ASSETS
from tests.product import Stub, connected, new_reference, open_stream

Change: TypeAlias = Callable[[ChaosSuite, str], Awaitable[None]]
ENDED_S = 20.0


async def _kill(suite: ChaosSuite, name: str) -> None:
    suite.suite.processes[name].kill()
    await suite.suite.processes[name].wait()


async def _restart(suite: ChaosSuite, name: str) -> None:
    async with asyncio.timeout(ENDED_S):
        await suite.suite.processes[name].wait()
    await suite.start(name)


async def _kill_stage(suite: ChaosSuite, name: str) -> None:
    names = WORKERS[name.partition("-")[0]]
    for each in names:
        await _kill(suite, each)
    for each in names:
        await suite.start(each)


async def _freeze(suite: ChaosSuite, name: str) -> None:
    suite.suite.processes[name].send_signal(signal.SIGSTOP)


async def _resume(suite: ChaosSuite, name: str) -> None:
    suite.suite.processes[name].send_signal(signal.SIGCONT)


async def _drain(suite: ChaosSuite, name: str) -> None:
    suite.suite.processes[name].terminate()


async def _cut(suite: ChaosSuite, name: str) -> None:
    suite.proxies[name].cut()


async def _cut_off(suite: ChaosSuite, name: str) -> None:
    """Break a process's connections and refuse new ones. A gateway's sessions find no free slot at another gateway."""
    if name in GATEWAYS:
        [other] = {*GATEWAYS} - {name}
        await _fill(suite, await suite.fillers.enter_async_context(connected(suite.suite.targets[other])))
    suite.proxies[name].leave()


async def _fill(suite: ChaosSuite, stub: Stub) -> None:
    """Open streams until no worker has room; they end with `suite.fillers`."""
    reference = await new_reference(stub, (ASSETS / "portrait.png").read_bytes())
    with suppress(grpc.aio.AioRpcError):
        while True:
            session = (await stub.CreateSession(pb.CreateSessionRequest(reference_id=reference.id))).session
            deletion = pb.DeleteSessionRequest(session_id=session.id)
            suite.fillers.push_async_callback(stub.DeleteSession, deletion)
            await open_stream(stub, session.id)


async def _swallow(suite: ChaosSuite, name: str) -> None:
    suite.proxies[name].swallow()


async def _mend(suite: ChaosSuite, name: str) -> None:
    suite.proxies[name].mend()
    await suite.fillers.aclose()


async def _nothing(suite: ChaosSuite, name: str) -> None:
    pass


KINDS: dict[str, tuple[Change, Change]] = {
    "kill": (_kill, _restart),
    "kill stage": (_kill_stage, _nothing),
    "freeze": (_freeze, _resume),
    "drain": (_drain, _restart),
    # The gateways reconnect at once; mending the proxy would cut their new connections.
    "cut": (_cut, _nothing),
    "cut off": (_cut_off, _mend),
    "swallow": (_swallow, _mend),
}


@dataclass(frozen=True)
class Fault:
    """A fault in a service.

    kind: of KINDS or ATTACKS. `kill stage` kills both workers, so that the stage is missing until they have restarted.
    service: a stage, `redis` or `gateway`.
    """

    kind: str
    service: str

    def __str__(self) -> str:
        return f"{self.kind} {self.service}"

    @property
    def is_exact(self) -> bool:
        """True if it changes no frame: the lost state is rebuilt exactly, or is not needed."""
        return self.is_attack or self.service not in ("denoiser", "gateway")

    @property
    def is_attack(self) -> bool:
        """True if it disturbs nobody."""
        return self.kind in ATTACKS

    @asynccontextmanager
    async def at(self, suite: ChaosSuite, name: str) -> AsyncGenerator[None, None]:
        """Keep the fault in a process while the body runs. A restarted process may become healthy only later."""
        if self.is_attack:
            async with background(ATTACKS[self.kind](suite.suite.targets[name])) as attack:
                yield
                assert not attack.done(), f"{self} ended early"
            return
        inject, end = KINDS[self.kind]
        await inject(suite, name)
        try:
            yield
        finally:
            await end(suite, name)


FAULTS = [
    # Text is not spoken if no voice worker answers for three seconds.
    *(Fault(kind, stage) for kind in KINDS for stage in WORKERS if (kind, stage) != ("kill stage", "voice")),
    *(Fault(kind, "redis") for kind in ("kill", "freeze")),
    *(Fault(kind, "gateway") for kind in ("kill", "drain", "cut off", *ATTACKS)),
]
