"""Stages: streams of a session through a model, and pipelines of them.

A streaming model is synchronous tensor code: open a session's state, then step item by item. A stage is one session's
stream through a model in this process (`local`) or at a peer (`avatar.rpc.client.RemoteStage`): an async generator of
answers over an async generator of items. A pipeline is stages in a row:

    pieces -> audio -> blocks -> denoiser 0 .. N-1 -> blocks -> vae -> chunks

A stage that is closed closes the stream that it reads, so closing the last one closes all.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar

from avatar.aio import background
from avatar.runtime.admission import StepTimes
from avatar.runtime.device_memory import Reservation
from avatar.runtime.device_queue import DeviceQueue, Job
from avatar.types import Conditions, Session

In = TypeVar("In")
Out = TypeVar("Out")
State = TypeVar("State")
In_contra = TypeVar("In_contra", contravariant=True)
Out_co = TypeVar("Out_co", covariant=True)

Stage: TypeAlias = Callable[[AsyncGenerator[In, None]], AsyncGenerator[Out, None]]

# Items of a stream that are read and not yet passed on: one at the caller, one being computed, and the next.
MAX_ITEMS = 3


class StreamingModel(Protocol[In_contra, Out_co, State]):
    """Tensor code that carries a state from item to item. Models own weights, states own history."""

    def open(self, session: Session) -> State: ...

    def step(self, item: In_contra, state: State) -> Out_co: ...


# The start and the end of a step, wall clock in nanoseconds, and its seconds in the device's queue (None without one):
# arguments of `telemetry.block_span`.
Step: TypeAlias = tuple[int, int, float | None]


@dataclass
class StreamUsage:
    """Computing time of one stream.

    step_times: of the stream's service, if it counts them. busy_s: seconds of all steps.
    """

    step_times: StepTimes | None = None
    busy_s: float = 0.0
    last_step: Step = (0, 0, None)

    def add_step(self, start_ns: int, end_ns: int, waited_s: float | None = None) -> None:
        step_s = (end_ns - start_ns) / 1e9
        self.last_step = start_ns, end_ns, waited_s
        self.busy_s += step_s
        if self.step_times is not None:
            self.step_times.append(step_s)

    def measure(self, work: Callable[..., Out], *arguments: Any) -> Out:
        """Call work and count it as a step."""
        start_ns, started_ns = time.time_ns(), time.perf_counter_ns()
        out = work(*arguments)
        self.add_step(start_ns, start_ns + time.perf_counter_ns() - started_ns)
        return out


def local(
    model: StreamingModel[In, Out, State],
    session: Session,
    queue: DeviceQueue,
    usage: StreamUsage | None = None,
    *,
    then: Callable[[Out], Out] | None = None,
    live_block_s: float | None = None,
    take_state: Callable[[], State] | None = None,
    reservation: Reservation | None = None,
    prefill: Callable[[Conditions, State], None] | None = None,
) -> Stage[In, Out]:
    """Return a stage that runs one session's stream through a model. Its state lives exactly as long as the stream.

    An item is submitted before the one ahead of it is done, so that the device need not wait for the event loop.

    queue: of the device that computes, shared by all its sessions. usage: counts the steps; when an answer is yielded,
    its last step is that answer's. then: applied to each answer on the device's thread, before its next job starts.
    live_block_s: of a live stream, the duration of its blocks. Each item has a deadline: its `due_s`, or a block from
        now if it has none.
    take_state: called once, returns the stream's state, of which no other reference is left; by default the model opens
        it on the device's thread.
    reservation: of the state's memory, until the state is freed.
    prefill: called with conditions among the items, of items to come, when the device has nothing more urgent to do.
        They are not answered, and only the latest ones count.
    """
    used = usage or StreamUsage()

    def deadline(item: In | None = None) -> float | None:
        due_s: float | None = getattr(item, "due_s", None)
        return time.monotonic() + live_block_s if due_s is None and live_block_s else due_s

    async def stage(items: AsyncGenerator[In, None]) -> AsyncGenerator[Out, None]:
        jobs: asyncio.Queue[Job | None] = asyncio.Queue()
        slots = asyncio.Semaphore(MAX_ITEMS)

        async def submit() -> None:
            state: Any = None
            last = coming = None
            try:
                async with aclosing(items):
                    state = take_state() if take_state else await queue.run(model.open, session, due_s=deadline())
                    if reservation is not None:
                        reservation.keep_for(state)
                    await slots.acquire()
                    async for item in items:
                        if prefill is not None and isinstance(item, Conditions):
                            if coming is not None:
                                queue.cancel(coming)
                            # Its error is not read: the first block under these conditions meets it again.
                            coming = queue.put(prefill, item, state)
                            continue
                        last = queue.step(model, item, state, deadline(item), then=then, after=last)
                        jobs.put_nowait(last)
                        await slots.acquire()
            finally:
                if coming is not None:
                    queue.cancel(coming)
                jobs.put_nowait(None)
                # An error of `items` may be kept, and its traceback this frame, which must not keep the state.
                state = last = coming = None

        async with background(submit()) as submitting:
            job = None
            try:
                while job := await jobs.get():
                    answer = await asyncio.wrap_future(job.future)
                    used.add_step(job.start_ns, job.end_ns, job.waited_s)
                    yield answer
                    slots.release()
                await submitting
            finally:
                jobs.put_nowait(job)
                while not jobs.empty():
                    if job := jobs.get_nowait():
                        queue.cancel(job)
                job = None  # as above

    return stage


async def flatten(lists: AsyncGenerator[list[Out], None]) -> AsyncGenerator[Out, None]:
    """Yield each item of each list: the audio stage answers a piece with any number of blocks."""
    async with aclosing(lists):
        async for items in lists:
            for item in items:
                yield item
