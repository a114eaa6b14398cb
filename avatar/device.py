"""A device: one thread that computes, and the jobs that wait for it.

All sessions, levels and services of a device wait in one queue. Where somebody waits for a block, the block that will
be missed first goes first; all other work follows in the order in which it came. A stream has one item at a device at a
time, so no more jobs wait than streams are open, and no session waits for another's future. A job whose caller is gone
leaves the queue; one that runs is finished, and the next is not begun before.

Blocks of several sessions that wait at the same time are stepped in one pass where their model says that it pays
(`BatchingModel`).

Times: `due_s` is in seconds of `time.monotonic` and None where nobody waits.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

from avatar.pace import Load, Usage

Out = TypeVar("Out")


# Items of equal key may be stepped in one pass, and how many at most.
Batch: TypeAlias = tuple[Hashable, int]


@runtime_checkable
class BatchingModel(Protocol):
    """A streaming model that can step several sessions at once."""

    def batch(self, item: Any, state: Any) -> Batch | None:
        """With whom an item can be stepped; None: alone. What is wrong with an item must show alone."""

    def step_many(self, items: Sequence[Any], states: Sequence[Any]) -> list[Any]:
        """What `step` gives for each item and its state; their batches have the same key."""


@dataclass(eq=False)
class Job:
    """One item that waits. take: results of several arguments, in their order. rank: the least goes first."""

    take: Callable[[list[Any]], list[Any]]
    argument: Any
    rank: tuple[bool, float, int]
    usage: Usage
    batch: Batch | None
    came_ns: int
    future: Future[Any] = field(default_factory=Future)


class Device:
    """A thread that takes the most urgent job that waits, and the next when it is done. A context: it ends the thread.

    load: what its live streams need. num_waiting: jobs that wait now.
    """

    def __init__(self, wait: Callable[[], None] | None = None) -> None:
        """wait: returns when the device has done what it was told; None where work is done when its call returns."""
        self.load = Load()
        self._wait = wait
        self._jobs: list[Job] = []
        self._lock = threading.Lock()
        # What wakes the thread: one for every job that was put, whatever has become of it. A condition is slower.
        self._calls: SimpleQueue[None] = SimpleQueue()
        self._num_jobs = 0
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="device", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Device":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the thread after the job that runs. What waits is cancelled."""
        with self._lock:
            self._is_closed = True
            waiting, self._jobs = self._jobs, []
        self._calls.put(None)
        for job in waiting:
            job.future.cancel()
        self._thread.join()

    @property
    def num_waiting(self) -> int:
        return len(self._jobs)

    def submit(self, work: Callable[..., Out], *arguments: Any) -> Future[Out]:
        """Have something done for which nobody waits, from any thread."""
        return self._put(_call(work, arguments), None, None, Usage()).future

    async def run(self, work: Callable[..., Out], *arguments: Any, due_s: float | None = None) -> Out:
        """What the work gives, done by `due_s` if it can be."""
        out: Out = await self._done(self._put(_call(work, arguments), None, due_s, Usage()))
        return out

    async def step(self, model: Any, item: Any, state: Any, usage: Usage, due_s: float | None = None) -> Any:
        """What a streaming model makes of an item, alone or together with others'; usage notes what it cost."""
        batch = model.batch(item, state) if isinstance(model, BatchingModel) else None
        if batch is None:
            return await self._done(self._put(lambda _: [model.step(item, state)], None, due_s, usage))

        def take(pairs: list[tuple[Any, Any]]) -> list[Any]:
            items, states = zip(*pairs, strict=True)
            return model.step_many(items, states)  # type: ignore[no-any-return]

        return await self._done(self._put(take, (item, state), due_s, usage, batch))

    def _put(
        self,
        take: Callable[[list[Any]], list[Any]],
        argument: Any,
        due_s: float | None,
        usage: Usage,
        batch: Batch | None = None,
    ) -> Job:
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the device is closed")
            self._num_jobs += 1
            # Nobody waits: in the order in which they came.
            rank = (due_s is None, due_s or 0.0, self._num_jobs)
            job = Job(take, argument, rank, usage, batch, time.perf_counter_ns())
            self._jobs.append(job)
        self._calls.put(None)
        return job

    async def _done(self, job: Job) -> Any:
        try:
            return await asyncio.wrap_future(job.future)
        except asyncio.CancelledError:
            with self._lock:
                if job in self._jobs:
                    self._jobs.remove(job)
            raise

    def _work(self) -> None:
        while True:
            jobs = self._next()
            if not jobs:
                return
            self._take(jobs)
            del jobs  # and with it their states, while the thread waits

    def _next(self) -> list[Job]:
        """Wait for jobs and take the most urgent out of the queue, with those that can be stepped with it."""
        while True:
            self._calls.get()
            with self._lock:
                if self._is_closed:
                    return []
                jobs = self._most_urgent()
                for job in jobs:
                    self._jobs.remove(job)
            if begun := [job for job in jobs if job.future.set_running_or_notify_cancel()]:
                return begun

    def _most_urgent(self) -> list[Job]:
        first = min(self._jobs, key=lambda job: job.rank, default=None)
        if first is None:
            return []
        if first.batch is None:
            return [first]
        # Live blocks do not wait for offline ones, not even within a pass.
        alike = [job for job in self._jobs if job.batch == first.batch and job.rank[0] == first.rank[0]]
        _, most = first.batch
        return sorted(alike, key=lambda job: job.rank)[:most]

    def _take(self, jobs: list[Job]) -> None:
        start_ns, started = time.time_ns(), time.perf_counter_ns()
        try:
            results = jobs[0].take([job.argument for job in jobs])
            if self._wait is not None:
                self._wait()
        except BaseException as error:
            while jobs:  # the traceback refers to this frame, and jobs to the error
                jobs.pop().future.set_exception(error)
            return
        elapsed_ns = time.perf_counter_ns() - started
        for job, result in zip(jobs, results, strict=True):
            job.usage.note(start_ns, elapsed_ns, (started - job.came_ns) / 1e9, len(jobs))
            job.future.set_result(result)


def _call(work: Callable[..., Out], arguments: tuple[Any, ...]) -> Callable[[list[Any]], list[Any]]:
    return lambda _: [work(*arguments)]
