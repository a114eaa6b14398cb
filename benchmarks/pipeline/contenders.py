"""Systems that are measured side by side: the suite with stand-in stages, and its peers. Each runs jobs and reports."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from typing import Protocol

from benchmarks import peers
from benchmarks.peers.work import Job as PeerJob
from benchmarks.peers.work import Report as PeerReport
from benchmarks.pipeline.client import Job, run_clients
from benchmarks.pipeline.processes import start_program
from benchmarks.pipeline.suite import standin_suite

# A job may take this much longer than its blocks would with one stage after another.
MARGIN_S = 60.0
STOP_S = 5.0
# client - audio - level 0 - 1 - 2 - 3 - vae - client, each through the gateway.
HOPS = 7
SUITE = "avatar"


class Contender(Protocol):
    """A system that runs jobs of one session. hops: number of times a block is handed on."""

    hops: int

    async def work(self, pace: str, num_blocks: int) -> PeerReport: ...


class SuiteContender:
    """The suite."""

    hops = HOPS

    def __init__(self, target: str, pids: list[int], step_s: float) -> None:
        self._target = target
        self._pids = pids
        self._step_s = step_s

    async def work(self, pace: str, num_blocks: int) -> PeerReport:
        """Run a job of one session."""
        return (await self.sessions(pace, num_blocks, 1))[0]

    async def sessions(self, pace: str, num_blocks: int, num_sessions: int) -> list[PeerReport]:
        """Run a job of concurrent sessions. Raises RuntimeError if one is refused or receives a wrong picture."""
        job = Job(self._target, pace, num_blocks, num_sessions, self._pids)
        limit_s = MARGIN_S + num_blocks * num_sessions * max(1.0, 6 * self._step_s)
        report = await run_clients(job, limit_s)
        for session in report.sessions:
            if session.refused or session.wrong:
                raise RuntimeError(
                    f"a session received {session.wrong} wrong pictures and ended: {session.refused or 'normally'}"
                )
        return [PeerReport(session.sent_s, session.arrived_s, 0, report.cpu_s) for session in report.sessions]


class Peer:
    """A peer's process."""

    def __init__(self, name: str, step_s: float) -> None:
        self.hops = peers.HOPS[name]
        self._name = name
        self._step_s = step_s

    async def work(self, pace: str, num_blocks: int) -> PeerReport:
        """Run a job. Raises RuntimeError if the peer makes a wrong picture, or ends."""
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
        """Id of its first process, the parent of the others."""
        return self._process.pid

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """Run its processes while the body runs."""
        program = ["-m", "benchmarks.peers", self._name, "--step-s", str(self._step_s)]
        self._process = await start_program(*program, limit=64 << 20)
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
async def contenders(step_s: float) -> AsyncGenerator[tuple[SuiteContender, dict[str, Contender]], None]:
    """Start the suite and all peers with stages of `step_s` seconds; give the suite, and all contenders by name."""
    async with AsyncExitStack() as stack:
        suite = await stack.enter_async_context(standin_suite(step_s))
        ours = SuiteContender(suite.gateway, [each.pid for each in suite.processes.values()], step_s)
        others = {name: Peer(name, step_s) for name in peers.NAMES}
        for each in others.values():
            await stack.enter_async_context(each.running())
        yield ours, {SUITE: ours, **others}
