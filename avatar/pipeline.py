"""From streaming models to a running pipeline.

A streaming model is synchronous: open a session's state, then step item by item. A stage is one session's stream at a
model in this process (`local`) or at a peer (`avatar.rpc.client.RemoteStage`): an async transformer of a stream of
items. A pipeline is stages in a row:

    pieces -> audio -> blocks -> denoiser 0 .. N-1 -> blocks -> vae -> chunks

Every stage closes the stream that it reads when it is closed itself, so closing the last one closes all.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine
from concurrent.futures import Executor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

if TYPE_CHECKING:  # the gateway composes stages and has no torch
    from avatar.types import Session

In = TypeVar("In")
Out = TypeVar("Out")
State = TypeVar("State")
In_contra = TypeVar("In_contra", contravariant=True)
Out_co = TypeVar("Out_co", covariant=True)

Stage: TypeAlias = Callable[[AsyncGenerator[In, None]], AsyncGenerator[Out, None]]


class StreamingModel(Protocol[In_contra, Out_co, State]):
    """Tensor code that carries a state from item to item. Models own weights, states own history."""

    def open(self, session: "Session") -> State: ...

    def step(self, item: In_contra, state: State) -> Out_co: ...


@dataclass
class Usage:
    """What a stream has cost.

    busy_s: seconds spent computing. start_ns, end_ns: wall clock of the last step, nanoseconds.
    """

    busy_s: float = 0.0
    start_ns: int = 0
    end_ns: int = 0

    def timed(self, step: Callable[[In, State], Out], item: In, state: State) -> Out:
        """Take a step and note what it cost."""
        self.start_ns = time.time_ns()
        started = time.perf_counter_ns()
        out = step(item, state)
        elapsed_ns = time.perf_counter_ns() - started
        self.end_ns = self.start_ns + elapsed_ns
        self.busy_s += elapsed_ns / 1e9
        return out


class Pace:
    """How long a block takes at a worker: the time that nine of its last ten blocks stayed within."""

    def __init__(self) -> None:
        self._steps: deque[float] = deque(maxlen=50)

    def note(self, usage: Usage) -> None:
        """A block was made: count its step."""
        self._steps.append((usage.end_ns - usage.start_ns) / 1e9)

    def measure(self, warm: Callable[[], int]) -> None:
        """Know a pace before the first stream.

        warm: makes blocks, and says how many; called twice, the first time cold.
        """
        warm()
        started_ns = time.perf_counter_ns()
        num_blocks = warm()
        self._steps.append((time.perf_counter_ns() - started_ns) / 1e9 / num_blocks)

    @property
    def step_s(self) -> float:
        """Seconds; 0 before the first block."""
        ranked = sorted(self._steps)
        return ranked[len(ranked) * 9 // 10] if ranked else 0.0


def local(
    model: StreamingModel[In, Out, State], session: "Session", executor: Executor, usage: Usage | None = None
) -> Stage[In, Out]:
    """One session's stream at a model in this process. Its state lives exactly as long as the stream.

    executor: one thread per device; all sessions of the device share it.
    """
    cost = usage or Usage()

    async def stage(items: AsyncGenerator[In, None]) -> AsyncGenerator[Out, None]:
        loop = asyncio.get_running_loop()
        async with aclosing(items):
            state = await loop.run_in_executor(executor, model.open, session)
            async for item in items:
                yield await loop.run_in_executor(executor, cost.timed, model.step, item, state)

    return stage


async def flatten(lists: AsyncGenerator[list[Out], None]) -> AsyncGenerator[Out, None]:
    """Each item of each list: the audio stage answers a piece with any number of blocks."""
    async with aclosing(lists):
        async for items in lists:
            for item in items:
                yield item


async def ahead(items: AsyncGenerator[Out, None]) -> AsyncGenerator[Out, None]:
    """The same items, made while the one before is worked on: one waits here, and one more to be let in.

    What `items` raises is raised behind those that came before it.
    """
    waiting: asyncio.Queue[list[Out]] = asyncio.Queue()
    room = asyncio.Semaphore(1)

    async def make() -> None:
        try:
            async with aclosing(items):
                async for item in items:
                    await room.acquire()
                    waiting.put_nowait([item])
        finally:
            waiting.put_nowait([])

    async with beside(make()) as making:
        while item := await waiting.get():
            room.release()
            yield item[0]
        await making


@asynccontextmanager
async def beside(coroutine: Coroutine[Any, Any, None]) -> AsyncGenerator[asyncio.Task[None], None]:
    """Run a coroutine beside the body; it ends with the body at the latest, before the body's caller goes on.

    Unlike a TaskGroup it does not cancel the body when the coroutine fails: the body decides what that means. That
    makes it fit for async generators, whose body runs in whatever task asks for the next item.
    """
    task = asyncio.get_running_loop().create_task(coroutine)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # the body has had its chance to look; do not warn that nobody did
