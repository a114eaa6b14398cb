"""Who is measured side by side: the suite with stand-in stages, and its peers. Each does jobs, and reports."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from typing import Protocol

from benchmarks import peers
from benchmarks.peers.work import Job as PeerJob
from benchmarks.peers.work import Report as PeerReport
from benchmarks.pipeline.client import Job
from benchmarks.pipeline.processes import clients, started
from benchmarks.pipeline.suite import standing_in

# A job may take so much longer than its blocks would with one stage after another.
SLACK_S = 60.0
STOP_S = 5.0
# client - audio - level 0 - 1 - 2 - 3 - vae - client; the gateway stands between each two.
HOPS = 7
OURS = "avatar"


class Contender(Protocol):
    """Something that does jobs of one session. hops: how often a block is handed on."""

    hops: int

    async def work(self, pace: str, num_blocks: int) -> PeerReport: ...


class Ours:
    """The suite."""

    hops = HOPS

    def __init__(self, target: str, pids: list[int], step_s: float) -> None:
        self._target = target
        self._pids = pids
        self._step_s = step_s

    async def work(self, pace: str, num_blocks: int) -> PeerReport:
        """One session's job."""
        return (await self.sessions(pace, num_blocks, 1))[0]

    async def sessions(self, pace: str, num_blocks: int, num_sessions: int) -> list[PeerReport]:
        """A job of several sessions at once. RuntimeError if one is refused or gets a wrong picture."""
        job = Job(self._target, pace, num_blocks, num_sessions, self._pids)
        limit_s = SLACK_S + num_blocks * num_sessions * max(1.0, 6 * self._step_s)
        report = await clients(job, limit_s)
        for heard in report.sessions:
            if heard.refused or heard.wrong:
                raise RuntimeError(
                    f"a session had {heard.wrong} wrong pictures and ended: {heard.refused or 'as it should'}"
                )
        return [
            PeerReport(heard.sent_s, [at for _, _, at, _ in heard.arrivals], 0, report.cpu_s)
            for heard in report.sessions
        ]


class Peer:
    """A peer's process."""

    def __init__(self, name: str, step_s: float) -> None:
        self.hops = peers.HOPS[name]
        self._name = name
        self._step_s = step_s

    async def work(self, pace: str, num_blocks: int) -> PeerReport:
        """One job. RuntimeError if the peer makes a wrong picture, or ends."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(asdict(PeerJob(pace, num_blocks))).encode() + b"\n")
        line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._name} ended")
        report = PeerReport(**json.loads(line))
        if report.wrong:
            raise RuntimeError(f"{self._name} made {report.wrong} wrong pictures")
        return report

    @property
    def pid(self) -> int:
        """Of its first process, whose children the others are."""
        return self._process.pid

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """Its processes run while the body does."""
        program = ["-m", "benchmarks.peers", self._name, "--step-s", str(self._step_s)]
        self._process = await started(*program, limit=64 << 20)
        try:
            yield
        finally:
            assert self._process.stdin
            self._process.stdin.close()
            try:
                async with asyncio.timeout(STOP_S):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
                await self._process.wait()


@asynccontextmanager
async def contenders(step_s: float) -> AsyncGenerator[tuple[Ours, dict[str, Contender]], None]:
    """The suite, and all by name, the suite among them, with stages of `step_s` seconds, while the body runs."""
    async with AsyncExitStack() as stack:
        suite = await stack.enter_async_context(standing_in(step_s))
        ours = Ours(suite.gateway, [each.pid for each in suite.processes.values()], step_s)
        others = {name: Peer(name, step_s) for name in peers.NAMES}
        for each in others.values():
            await stack.enter_async_context(each.running())
        yield ours, {OURS: ours, **others}
