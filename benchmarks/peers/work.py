"""Jobs of peers, what they report, and the sound that blocks are made of."""

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

from avatar.types import BLOCK_S
from benchmarks.standin import content
from benchmarks.standin.step import wake_in_time

PR_SET_PDEATHSIG = 1
DECODER = content.NUM_LEVELS
# What an audio encoder takes, on whichever process has it.
AUDIO_STEP_S = 0.001


@dataclass(frozen=True)
class Job:
    """pace: `alone`, `full` or `live`. num_blocks: that count; a peer may make others before them."""

    pace: str
    num_blocks: int


@dataclass
class Report:
    """When the sound of each block was there, and when its picture was; pictures that are wrong; processor time."""

    sent_s: list[float] = field(default_factory=list)
    came_s: list[float] = field(default_factory=list)
    wrong: int = 0
    cpu_s: float = 0.0

    def came(self, sound: bytes, picture: bytes) -> None:
        """A block's picture is there."""
        self.came_s.append(time.monotonic())
        self.wrong += picture != content.expected(sound)


class Peer(Protocol):
    """A pattern that does jobs."""

    def work(self, job: Job) -> Report: ...


class Microphone:
    """The sound of blocks, as it comes: at once, or a block every 480 ms."""

    def __init__(self, job: Job, report: Report) -> None:
        self._job = job
        self._report = report
        self._began = time.monotonic()

    def hear(self, block: int) -> bytes:
        """Wait for the sound of a block, counted from 0."""
        if self._job.pace == "live":
            time.sleep(max(0.0, self._began + (block + 1) * BLOCK_S - time.monotonic()))
        self._report.sent_s.append(time.monotonic())
        return sound_of(block)


def sound_of(block: int) -> bytes:
    """A block's sound: no two of a job are alike."""
    return block.to_bytes(8, "little") * (content.SOUND_BYTES // 8)


@contextmanager
def processes(run: Callable[..., None], arguments: list[tuple[Any, ...]]) -> Iterator[list[int]]:
    """Processes that end with the body, and with this process however it ends; gives their ids."""
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=_begin, args=(os.getpid(), run, each), daemon=True) for each in arguments]
    try:
        for process in started:
            process.start()
        yield [process.pid for process in started if process.pid]
    finally:
        for process in started:  # all before any is waited for: one that lost another would tell of it
            process.kill()
        for process in started:
            process.join()


def _begin(parent: int, run: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the kernel was told
            sys.exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    wake_in_time()
    run(*arguments)
