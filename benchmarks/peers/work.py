"""Jobs and reports of peers, and the audio of blocks."""

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from benchmarks.standin import content
from benchmarks.standin.step import set_timer_slack

PR_SET_PDEATHSIG = 1
DECODER = content.NUM_LEVELS
# Step of the audio encoder, in whichever process runs it.
AUDIO_STEP_S = 0.001


@dataclass(frozen=True)
class Job:
    """Work for a peer. pace: `alone`, `full` or `live`. num_blocks: blocks to measure, after any warm-up blocks."""

    pace: str
    num_blocks: int


@dataclass
class Report:
    """Times at which each block's audio was available and its picture arrived; number of wrong pictures; CPU time."""

    sent_s: list[float] = field(default_factory=list)
    arrived_s: list[float] = field(default_factory=list)
    wrong: int = 0
    cpu_s: float = 0.0

    def add(self, audio: bytes, picture: bytes) -> None:
        """Record and check a block's picture."""
        self.arrived_s.append(time.monotonic())
        self.wrong += picture != content.PUBLIC.expected_picture(audio)


class Peer(Protocol):
    """A system that runs jobs."""

    def work(self, job: Job) -> Report: ...


class Microphone:
    """Source of the blocks' audio: at once, or a block every 480 ms."""

    def __init__(self, job: Job, report: Report) -> None:
        self._job = job
        self._report = report
        self._started = time.monotonic()

    def read(self, block: int) -> bytes:
        """Wait for the audio of a block, counted from 0."""
        if self._job.pace == "live":
            time.sleep(max(0.0, self._started + (block + 1) * content.PUBLIC.block_s - time.monotonic()))
        self._report.sent_s.append(time.monotonic())
        return audio_of(block)


def audio_of(block: int) -> bytes:
    """Return a block's audio: different for every block of a job."""
    return block.to_bytes(8, "little") * (content.PUBLIC.block_bytes() // 8)


@contextmanager
def processes(run: Callable[..., None], arguments: list[tuple[Any, ...]]) -> Iterator[list[int]]:
    """Start processes that end with the body, or with this process however it ends; give their ids."""
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=_run, args=(os.getpid(), run, each), daemon=True) for each in arguments]
    try:
        for process in started:
            process.start()
        yield [process.pid for process in started if process.pid]
    finally:
        for process in started:  # kill all before joining any: a process that lost another would log an error
            process.kill()
        for process in started:
            process.join()


def _run(parent: int, run: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent ended before prctl took effect
            sys.exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_timer_slack()
    run(*arguments)
