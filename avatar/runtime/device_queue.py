"""A device: one thread that computes, and the jobs that wait for it.

All sessions, levels and services of a device wait in one queue. Where somebody waits for a block, the block that will
be missed first goes first; all other work follows in the order in which it came. A stream's item is put behind the one
before it and enters the queue when that is done: no more jobs wait than streams are open, no session waits for
another's future, and the device waits for no event loop. A job whose caller is gone leaves the queue; one that runs is
finished, and the next is not begun before. What is put behind a job that fails is never done.

Times: `due_s` is in seconds of `time.monotonic` and None where nobody waits.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from types import TracebackType
from typing import Any, TypeVar

from avatar.runtime.admission import Load

Out = TypeVar("Out")


@dataclass(eq=False)
class Job:
    """One item that waits.

    take: the work; returns the job's result. due_s: None if nobody waits. behind: the stream's next job. cost:
    arguments for `Usage.note`. rank, came_ns: set when it enters the queue; the least rank goes first.
    """

    take: Callable[[], Any]
    due_s: float | None = None
    future: Future[Any] = field(default_factory=Future)
    behind: "Job | None" = None
    is_done: bool = False
    cost: tuple[int, int, float] = (0, 0, 0.0)
    rank: tuple[bool, float, int] = (True, 0.0, 0)
    came_ns: int = 0


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
        """End the thread after the job that runs. What waits in the queue is cancelled."""
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
        return self._put(Job(lambda: work(*arguments))).future

    async def run(self, work: Callable[..., Out], *arguments: Any, due_s: float | None = None) -> Out:
        """What the work gives, done by `due_s` if it can be."""
        out: Out = await self.done(self._put(Job(lambda: work(*arguments), due_s)))
        return out

    def step(
        self,
        model: Any,
        item: Any,
        state: Any,
        due_s: float | None = None,
        *,
        then: Callable[[Any], Any] | None = None,
        after: Job | None = None,
    ) -> Job:
        """Have a streaming model make something of an item.

        then: what is made of the result before the device begins anything else. after: the stream's item before it; if
        that fails or is dropped, this one is never done, and not to be waited for.
        """

        def take() -> Any:
            made = model.step(item, state)
            return then(made) if then else made

        return self._put(Job(take, due_s), after)

    async def done(self, job: Job) -> Any:
        """What a job gives. It is dropped when its caller is cancelled."""
        try:
            return await asyncio.wrap_future(job.future)
        except asyncio.CancelledError:
            self.drop(job)
            raise

    def drop(self, job: Job) -> None:
        """Nobody wants this job any more: it is not done, unless it is begun."""
        job.future.cancel()
        with self._lock:
            if job in self._jobs:
                self._jobs.remove(job)

    def _put(self, job: Job, after: Job | None = None) -> Job:
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the device is closed")
            if after is None or after.is_done:
                self._enter(job)
            else:
                after.behind = job
        return job

    def _enter(self, job: Job) -> None:
        """A job enters the queue. The lock is held."""
        self._num_jobs += 1
        # Nobody waits: in the order in which they came.
        job.rank = (job.due_s is None, job.due_s or 0.0, self._num_jobs)
        job.came_ns = time.perf_counter_ns()
        self._jobs.append(job)
        self._calls.put(None)

    def _work(self) -> None:
        while True:
            job = self._next()
            if job is None:
                return
            self._take(job)
            del job  # and with it its state, while the thread waits

    def _next(self) -> Job | None:
        """Wait for a job and take the most urgent out of the queue; None when the device is closed."""
        while True:
            self._calls.get()
            with self._lock:
                if self._is_closed:
                    return None
                job = min(self._jobs, key=lambda job: job.rank, default=None)
                if job is not None:
                    self._jobs.remove(job)
            if job is not None and job.future.set_running_or_notify_cancel():
                return job
            del job  # and with it its state, while the thread waits

    def _take(self, job: Job) -> None:
        start_ns, started = time.time_ns(), time.perf_counter_ns()
        try:
            result = job.take()
            if self._wait is not None:
                self._wait()
        except BaseException as error:
            future = job.future
            del job  # the traceback refers to this frame
            future.set_exception(error)
            del future
            return
        job.cost = start_ns, time.perf_counter_ns() - started, (started - job.came_ns) / 1e9
        job.future.set_result(result)
        with self._lock:
            self._let_in_behind(job)

    def _let_in_behind(self, job: Job) -> None:
        """A job is done: the stream's next one enters the queue. The lock is held."""
        job.is_done = True
        following, job.behind = job.behind, None
        if following is None or following.future.cancelled():
            return
        if self._is_closed:
            following.future.cancel()
        else:
            self._enter(following)
