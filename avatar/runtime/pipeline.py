"""From streaming models to a running pipeline.

A streaming model is synchronous: open a session's state, then step item by item. A stage is one session's stream at a
model in this process (`local`) or at a peer (`avatar.rpc.client.RemoteStage`): an async transformer of a stream of
items. A pipeline is stages in a row:

    pieces -> audio -> blocks -> denoiser 0 .. N-1 -> blocks -> vae -> chunks

Every stage closes the stream that it reads when it is closed itself, so closing the last one closes all.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar

from avatar.aio import background
from avatar.runtime.admission import Usage
from avatar.runtime.device_queue import Device, Job
from avatar.types import BLOCK_S

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


def local(
    model: StreamingModel[In, Out, State],
    session: "Session",
    device: Device,
    usage: Usage | None = None,
    *,
    then: Callable[[Out], Out] | None = None,
    is_live: bool = False,
) -> Stage[In, Out]:
    """One session's stream at a model in this process. Its state lives exactly as long as the stream.

    An item is at the device before the one ahead of it is done, so that the device need not wait for the event loop; no
    more than three are read before the caller comes back for another.

    device: where it computes; all sessions of the device share it, and an item goes by its `due_s` if it has one.
    then: what is made of an answer before the device begins anything else.
    is_live: somebody waits for every item: one that does not say when it is due, is due a block from now.
    """
    cost = usage or Usage()

    def due_s(item: In | None = None) -> float | None:
        said: float | None = getattr(item, "due_s", None)
        return time.monotonic() + BLOCK_S if said is None and is_live else said

    async def stage(items: AsyncGenerator[In, None]) -> AsyncGenerator[Out, None]:
        jobs: asyncio.Queue[Job | None] = asyncio.Queue()
        # One that the caller has, one that is worked on, and the next.
        room = asyncio.Semaphore(3)

        async def submit() -> None:
            last = None
            try:
                async with aclosing(items):
                    state = await device.run(model.open, session, due_s=due_s())
                    await room.acquire()
                    async for item in items:
                        last = device.step(model, item, state, due_s(item), then=then, after=last)
                        jobs.put_nowait(last)
                        await room.acquire()
            finally:
                jobs.put_nowait(None)

        async with background(submit()) as submitting:
            try:
                while job := await jobs.get():
                    made = await device.done(job)
                    cost.note(*job.cost)
                    yield made
                    room.release()
                await submitting
            finally:
                while not jobs.empty():
                    if job := jobs.get_nowait():
                        device.drop(job)

    return stage


async def flatten(lists: AsyncGenerator[list[Out], None]) -> AsyncGenerator[Out, None]:
    """Each item of each list: the audio stage answers a piece with any number of blocks."""
    async with aclosing(lists):
        async for items in lists:
            for item in items:
                yield item
