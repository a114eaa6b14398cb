"""A stage that outlives its workers: one session's stream, at whichever worker serves it.

When a worker is lost, or does not answer in time, the stream is opened elsewhere, or there again once it is back, and
is given its history; answers that were passed on before are left out. The session goes on: nothing is lost and nothing
comes twice.

    items -> waiting -> history -> RemoteStage at some worker -> answers without repeats
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from avatar import telemetry
from avatar.aio import background
from avatar.errors import AvatarError, NoCapacity, SessionNotFound, StageFailed, StageLost, StoreUnavailable
from avatar.failover.pool import Worker
from avatar.failover.replay import Replay
from avatar.rpc.client import Answer, Item
from avatar.worker.v1 import types_pb2

logger = logging.getLogger(__name__)
Item_contra = TypeVar("Item_contra", contravariant=True)
Answer_co = TypeVar("Answer_co", covariant=True)

# A block that ends the stream wherever it is sent is not sent for ever.
MAX_LOSSES, FORGET_S = 3, 60.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 0.5


class OpenStream(Protocol[Item_contra, Answer_co]):
    """A stream that is open: a `RemoteStage`, or several that are one."""

    @property
    def closed(self) -> types_pb2.Closed: ...

    def __call__(self, items: AsyncGenerator[Item_contra, None]) -> AsyncGenerator[Answer_co, None]: ...

    def cancel(self) -> None: ...


@dataclass(frozen=True)
class FailoverTimeouts:
    """How long a stream waits.

    stall_s: seconds that an answer may be due, beside four times what a step takes, before the worker counts as lost.
    rebuild_s: seconds in which a lost stream has to be open again.
    """

    stall_s: float
    rebuild_s: float


class FailoverStage(Generic[Item, Answer]):
    """One session's stream at a stage: open it, then call it with the stream of items.

    stage: name that errors carry. history: what rebuilds it. connect: opens a stream for the history as it is now;
    gives the worker, the opened stream and what it answered. on_rebuilt: told the first block of a rebuilt stream.
    """

    def __init__(
        self,
        stage: str,
        history: Replay[Item, Answer],
        connect: Callable[[], Awaitable[tuple[Worker[Any], OpenStream[Item, Answer], Any]]],
        patience: FailoverTimeouts,
    ) -> None:
        self.stage = stage
        self.history = history
        self.closed = types_pb2.Closed()
        self.on_rebuilt: Callable[[int], None] = lambda _: None
        self._connect = connect
        self._patience = patience
        self._link: tuple[Worker[Any], OpenStream[Item, Answer]] | None = None
        self._waiting: asyncio.Queue[list[Item]] = asyncio.Queue()
        self._room = asyncio.Semaphore(1)
        self._due_at: float | None = None
        self._silent_at: float | None = None
        self._is_ending = False
        self._lost_at = -math.inf
        self._timer: asyncio.Timeout | None = None
        self._num_losses = 0
        self._is_rebuilt = False

    async def open(self) -> Any:
        """Open the stream; the worker's `opened`. Raises what the workers say."""
        worker, remote, opened = await self._connect()
        self._link, self._silent_at = (worker, remote), None
        worker.on_silence.add(self._give_up)
        return opened

    async def __call__(self, items: AsyncGenerator[Item, None]) -> AsyncGenerator[Answer, None]:
        """The answers, until all have come. If `items` fails, that is what is raised."""
        num_blocks, last = 0, None
        async with background(self._pull(items)) as pulling:
            while True:
                try:
                    async with aclosing(self._answers(pulling)) as answers:
                        async for answer in answers:
                            if (block := self.history.took(answer)) is None:
                                continue
                            self._num_losses = 0
                            num_blocks, last = num_blocks + (block != last), block
                            if self._is_rebuilt:
                                self._is_rebuilt = False
                                self.on_rebuilt(block)
                            yield answer
                    assert self._link is not None
                    busy_s = self._link[1].closed.busy_s
                    self.closed = types_pb2.Closed(num_blocks=num_blocks, busy_s=busy_s)
                    return
                except (StageLost, StageFailed) as error:
                    if pulling.done() and not pulling.cancelled() and pulling.exception():
                        raise  # it is the stage before this one that is lost
                    await self._rebuild(error)

    def cancel(self) -> None:
        """End the stream at once; nothing happens if it has ended."""
        if self._link:
            worker, remote = self._link
            self._link = None
            worker.num_open -= 1
            worker.on_silence.discard(self._give_up)
            remote.cancel()

    async def _pull(self, items: AsyncGenerator[Item, None]) -> None:
        """Have one item wait, and one more to be let in, whatever becomes of the stream."""
        try:
            async with aclosing(items):
                async for item in items:
                    await self._room.acquire()
                    self._waiting.put_nowait([item])
        finally:
            self._waiting.put_nowait([])

    async def _given(self, pulling: asyncio.Task[None]) -> AsyncGenerator[Item, None]:
        """What the stream is given: its history, then what comes."""
        for item in self.history.again():
            yield item
        while waiting := await self._waiting.get():
            self._room.release()
            self.history.sent(waiting[0])
            self._watch()
            yield waiting[0]
        self._waiting.put_nowait([])  # for the stream that may have to follow this one
        self._is_ending = True
        self._watch()
        await pulling

    async def _answers(self, pulling: asyncio.Task[None]) -> AsyncGenerator[Answer, None]:
        """The stream's answers. StageLost if one that is due does not come."""
        assert self._link is not None
        async with aclosing(self._link[1](self._given(pulling))) as answers:
            while True:
                # The time that a consumer takes is not the worker's.
                self._due_at = self._silent_at
                self._watch()
                try:
                    async with asyncio.timeout_at(self._due_at) as self._timer:
                        answer = await anext(answers)
                except StopAsyncIteration:
                    return
                except TimeoutError as error:
                    message = f"{self.stage} has not answered in time"
                    raise StageLost(message, metadata={"stage": self.stage}, retry_s=1.0) from error
                finally:
                    self._timer = None
                yield answer

    def _watch(self) -> None:
        """Let the time begin in which an answer is due, if one is and it has not begun."""
        if self._link and self._due_at is None and (self.history.is_waiting or self._is_ending):
            step_s = getattr(self._link[0].info, "step_s", 0.0)
            self._await_until(asyncio.get_running_loop().time() + self._patience.stall_s + 4 * step_s)

    def _give_up(self) -> None:
        """The worker is silent: wait no longer."""
        self._silent_at = asyncio.get_running_loop().time()
        self._await_until(self._silent_at)

    def _await_until(self, due_at: float) -> None:
        self._due_at = due_at
        if self._timer and not self._timer.expired():
            self._timer.reschedule(due_at)

    async def _rebuild(self, lost: AvatarError) -> None:
        """Open the stream anew. Raises what was lost, if it is lost again and again or cannot be opened in time."""
        started, pause_s = time.monotonic(), FIRST_PAUSE_S
        # A session that idles may well outlive many workers.
        self._num_losses = self._num_losses + 1 if started - self._lost_at < FORGET_S else 1
        self._lost_at = started
        if self._link:
            self._link[0].lost()  # until it is asked again: a spare goes first
        self.cancel()
        if self._num_losses > MAX_LOSSES:
            raise lost
        while True:
            try:
                await self.open()
                break
            # Not found: the store was emptied, and is told again by who keeps the session, or ends it.
            except (StageLost, StageFailed, NoCapacity, StoreUnavailable, SessionNotFound) as error:
                if time.monotonic() - started > self._patience.rebuild_s:
                    raise lost from error
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        self._is_rebuilt = True
        taken_s = time.monotonic() - started
        telemetry.REBUILD_DURATION.record(taken_s, {"stage": self.stage.partition("-")[0]})
        logger.warning(
            "stream rebuilt", extra={"stage": self.stage, "reason": lost.reason, "duration_s": round(taken_s, 3)}
        )
