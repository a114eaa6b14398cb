"""Faults and their repair: each is two functions of the suite and the name of a process."""

import asyncio
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeAlias

from tests.chaos.suite import WORKERS, Spared

Change: TypeAlias = Callable[[Spared, str], Awaitable[None]]
ENDED_S = 20.0


async def _kill(suite: Spared, name: str) -> None:
    suite.suite.processes[name].kill()
    await suite.suite.processes[name].wait()


async def _revive(suite: Spared, name: str) -> None:
    async with asyncio.timeout(ENDED_S):
        await suite.suite.processes[name].wait()
    await suite.start(name)


async def _raze(suite: Spared, name: str) -> None:
    names = WORKERS[name.partition("-")[0]]
    for each in names:
        await _kill(suite, each)
    for each in names:
        await suite.start(each)


async def _freeze(suite: Spared, name: str) -> None:
    suite.suite.processes[name].send_signal(signal.SIGSTOP)


async def _thaw(suite: Spared, name: str) -> None:
    suite.suite.processes[name].send_signal(signal.SIGCONT)


async def _drain(suite: Spared, name: str) -> None:
    suite.suite.processes[name].terminate()


async def _cut(suite: Spared, name: str) -> None:
    suite.proxies[name].cut()


async def _swallow(suite: Spared, name: str) -> None:
    suite.proxies[name].swallow()


async def _mend(suite: Spared, name: str) -> None:
    suite.proxies[name].mend()


async def _nothing(suite: Spared, name: str) -> None:
    pass


WAYS: dict[str, tuple[Change, Change]] = {
    "kill": (_kill, _revive),
    "raze": (_raze, _nothing),
    "freeze": (_freeze, _thaw),
    "drain": (_drain, _revive),
    # Whoever was cut off may connect again at once: mending would cut off those who have.
    "cut": (_cut, _nothing),
    "swallow": (_swallow, _mend),
}


@dataclass(frozen=True)
class Fault:
    """A way in which a service breaks.

    way: of WAYS; what is razed has no spare, and is missed until it has started again. service: a stage, `redis` or
    `gateway`.
    """

    way: str
    service: str

    def __str__(self) -> str:
        return f"{self.way} {self.service}"

    @property
    def is_exact(self) -> bool:
        """True if frames have the same bytes as without the fault: lost state is rebuilt exactly, or was not needed."""
        return self.service not in ("denoiser", "gateway")

    @asynccontextmanager
    async def at(self, suite: Spared, name: str) -> AsyncGenerator[None, None]:
        """Break a process while the body runs. A repaired process may take a while to serve."""
        harm, mend = WAYS[self.way]
        await harm(suite, name)
        try:
            yield
        finally:
            await mend(suite, name)


FAULTS = [
    *(Fault(way, stage) for way in WAYS for stage in WORKERS),
    *(Fault(way, "redis") for way in ("kill", "freeze")),
    *(Fault(way, "gateway") for way in ("kill", "drain")),
]
