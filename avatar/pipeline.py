"""From streaming models to a running pipeline.

A streaming model is synchronous: open a session's state, then step item by item. A stage is one session's stream at a
model in this process (`local`) or at a peer (`avatar.rpc.client.RemoteStage`): an async transformer of a stream of
items. A pipeline is stages in a row:

    pieces -> audio -> blocks -> denoiser 0 .. N-1 -> blocks -> vae -> chunks

Every stage closes the stream that it reads when it is closed itself, so closing the last one closes all.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

from avatar.device import Device
from avatar.pace import BLOCK_S, Usage

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
    is_live: bool = False,
) -> Stage[In, Out]:
    """One session's stream at a model in this process. Its state lives exactly as long as the stream.

    device: where it computes; all sessions of the device share it, and an item goes by its `due_s` if it has one.
    is_live: somebody waits for every item: one that does not say when it is due, is due a block from now.
    """
    cost = usage or Usage()

    def due_s(item: In | None = None) -> float | None:
        said: float | None = getattr(item, "due_s", None)
        return time.monotonic() + BLOCK_S if said is None and is_live else said

    async def stage(items: AsyncGenerator[In, None]) -> AsyncGenerator[Out, None]:
        async with aclosing(items):
            state = await device.run(model.open, session, due_s=due_s())
            async for item in items:
                yield await device.step(model, item, state, cost, due_s(item))

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
