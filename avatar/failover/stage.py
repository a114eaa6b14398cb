"""A stage that outlives its workers: one session's stream, at whichever worker serves it.

When a worker is lost, or does not answer in time, the stream is opened at another worker, or at the same one once it is
back, and receives its replay first. Answers that were passed on before are left out, so that the session goes on
without a gap and without a repeat.

    items -> queue -> replay -> stream at some worker -> answers without repeats
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Generic, cast

from avatar import telemetry
from avatar.aio import WaitLimit, background
from avatar.errors import AvatarError, NoCapacity, SessionBusy, StageFailed, StageLost
from avatar.failover.connector import OpenStream, StageConnector
from avatar.failover.pool import Worker
from avatar.rpc.client import Answer, Item
from avatar.worker.v1 import types_pb2

logger = logging.getLogger(__name__)

# A block that breaks every worker must not be sent for ever: a stream outlives at most MAX_LOSSES losses in a row, that
# is, without an answer between them and each within FORGET_S seconds of the one before.
MAX_LOSSES, FORGET_S = 3, 60.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 0.5


@dataclass(frozen=True)
class FailoverTimeouts:
    """Limits on how long a stream waits.

    stall_s: seconds that an answer may be overdue before the worker counts as lost, plus four times its step time.
    rebuild_s: seconds within which a lost stream has to be open again; also those that a stream's first answer at a
    worker may be overdue, since a worker may compute something for the first time for it, and fills its window again.
    """

    stall_s: float
    rebuild_s: float


class FailoverStage(Generic[Item, Answer]):
    """One session's stream at a stage: open it, then call it with the stream of items.

    stage: name that errors carry. closed: what the stream did, once it has ended.
    on_rebuilt: called with the first block that a rebuilt stream answers. lost_at_s: when a worker was last lost, in
    seconds of `time.monotonic`; -inf if none was.
    """

    def __init__(self, connector: StageConnector[Item, Answer], timeouts: FailoverTimeouts) -> None:
        self.stage = connector.stage
        self.closed = types_pb2.Closed()
        self.on_rebuilt: Callable[[int], None] = lambda _: None
        self._connector = connector
        self._replay = connector.replay
        self._timeouts = timeouts
        self._current: tuple[Worker[Any], OpenStream[Item, Answer]] | None = None
        # Lists of one item; an empty list is the end. An item of None stands for `_coming`.
        self._queue: asyncio.Queue[list[Item | None]] = asyncio.Queue()
        # Conditions to send ahead of their first block, and whether the worker takes them.
        self._coming: types_pb2.Conditions | None = None
        self._takes_prefill = False
        self._free_slots = asyncio.Semaphore(1)
        # Of the wait for the next answer; how many seconds it may take once the answer is due.
        self._wait = WaitLimit()
        self._stall_s = 0.0
        self._is_silent = False
        self._has_answered = False  # at its present worker
        self._is_closing = False
        self.lost_at_s = -math.inf
        self._num_losses = 0
        self._is_rebuilt = False

    @property
    def worker(self) -> str:
        """HOST:PORT of the worker that the stream is at; empty if it is at none."""
        return self._current[0].target if self._current else ""

    @property
    def is_answer_due(self) -> bool:
        """True if the stream has been sent all that its next answer needs."""
        return self._replay.is_answer_due

    def room(self) -> float:
        """Return the free slots of the workers that serve the stream, in sessions; see `WorkerPool.room`."""
        return self._connector.room()

    def is_full(self) -> bool:
        """Return whether workers serve the stream, all are known to be full, and none has a slot of the session."""
        return self._connector.is_full()

    async def open(self) -> Any:
        """Open the stream; return the worker's `opened`. Raises the workers' error."""
        worker, stream, opened = await self._connector.connect()
        self._current, self._is_silent, self._has_answered = (worker, stream), False, False
        self._takes_prefill = getattr(opened, "takes_prefill", False)
        worker.on_silence.add(self._give_up)
        return opened

    async def __call__(self, items: AsyncGenerator[Item, None]) -> AsyncGenerator[Answer, None]:
        """Yield the stage's answers, each once. If `items` fails, its error is raised."""
        num_blocks, last = 0, None
        async with background(self._pull(items)) as pulling:
            while True:
                assert self._current is not None
                worker, stream = self._current
                try:
                    async with aclosing(stream(self._stream_items(pulling))) as answers:
                        while True:
                            self._stall_s = self._limit_s(worker)
                            is_due = self._is_silent or self._replay.is_answer_due or self._is_closing
                            # The time that the consumer takes between two answers does not count against the worker.
                            try:
                                with self._wait:
                                    if is_due:
                                        self._wait.set(self._stall_s)
                                    answer = await anext(answers)
                            except StopAsyncIteration:
                                self.closed = types_pb2.Closed(num_blocks=num_blocks, busy_s=stream.closed.busy_s)
                                return
                            except TimeoutError as error:
                                message = f"{self.stage} has not answered in time"
                                raise StageLost(message, metadata={"stage": self.stage}, retry_s=1.0) from error
                            self._has_answered = True
                            if (block := self._replay.accept(answer)) is None:
                                continue
                            self._num_losses = 0
                            num_blocks, last = num_blocks + (block != last), block
                            if self._is_rebuilt:
                                self._is_rebuilt = False
                                self.on_rebuilt(block)
                            yield answer
                except (StageLost, StageFailed, SessionBusy) as error:
                    if pulling.done() and not pulling.cancelled() and pulling.exception():
                        raise  # the stage before this one is lost
                    await self._reopen(error)

    def prefill(self, conditions: types_pb2.Conditions) -> None:
        """Send conditions ahead of their first block, in place of others that are not sent yet.

        They are a hint: the first block carries them all the same, also to another worker.
        """
        if self._coming is None:
            self._queue.put_nowait([None])
        self._coming = conditions

    def cancel(self) -> None:
        """End the stream at once; does nothing if it has ended."""
        if self._current:
            worker, stream = self._current
            self._current = None
            worker.load.num_own -= 1
            worker.on_silence.discard(self._give_up)
            stream.cancel()

    def close(self) -> None:
        """End the stream for good, and drop its replay: megabytes, which garbage collection might free much later."""
        self.cancel()
        self._connector.session = ()
        self._replay.clear()

    async def _pull(self, items: AsyncGenerator[Item, None]) -> None:
        """Move items to the queue, one ahead of the stream, whether or not a stream is open."""
        try:
            async with aclosing(items):
                async for item in items:
                    await self._free_slots.acquire()
                    self._queue.put_nowait([item])
        finally:
            self._queue.put_nowait([])

    async def _stream_items(self, pulling: asyncio.Task[None]) -> AsyncGenerator[Item, None]:
        """Yield what a stream is sent: the replay, then items from the queue."""
        for kept in self._replay.items():
            yield kept
        while queued := await self._queue.get():
            [item] = queued
            if item is None:
                coming, self._coming = self._coming, None
                if self._takes_prefill:
                    yield cast(Item, coming)
            else:
                self._free_slots.release()
                self._replay.record(item)
                self._limit_wait()
                yield item
        self._queue.put_nowait([])  # for the stream that may have to replace this one
        self._is_closing = True
        self._limit_wait()
        await pulling

    def _limit_s(self, worker: Worker[Any]) -> float:
        """Return how many seconds the next answer may take once it is due."""
        if self._is_silent:
            return 0.0
        limit_s = self._timeouts.stall_s + 4 * getattr(worker.info, "step_s", 0.0)
        return limit_s if self._has_answered else max(limit_s, self._timeouts.rebuild_s)

    def _limit_wait(self) -> None:
        """Limit the wait for the next answer, if it has no limit and the answer has become due."""
        is_due = self._replay.is_answer_due or self._is_closing
        if is_due and self._wait.is_unlimited:
            self._wait.set(self._stall_s)

    def _give_up(self) -> None:
        """Stop waiting: the worker does not answer polls."""
        self._is_silent = True
        self._wait.set(0.0)

    async def _reopen(self, lost: AvatarError) -> None:
        """Open the stream again. Raises the loss if the stream was lost too often, or cannot be opened in time."""
        started, pause_s = time.monotonic(), FIRST_PAUSE_S
        # A session that idles may well outlive many workers.
        self._num_losses = self._num_losses + 1 if started - self.lost_at_s < FORGET_S else 1
        self.lost_at_s = started
        # The worker is lost until it answers again: a spare is tried first. If it gave the slot to another gateway's
        # stream, it is not lost, and this session has moved, unless the take-over fails.
        if self._current and not isinstance(lost, SessionBusy):
            self._current[0].mark_lost()
        self.cancel()
        if self._num_losses > MAX_LOSSES:
            raise lost
        while True:
            try:
                await self.open()
                break
            except (StageLost, StageFailed, NoCapacity) as error:
                if time.monotonic() - started > self._timeouts.rebuild_s:
                    raise lost from error
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        self._is_rebuilt = True
        elapsed_s, labels = time.monotonic() - started, {"stage": self.stage.partition("-")[0]}
        telemetry.STREAMS_REBUILT.add(1, labels)
        telemetry.REBUILD_DURATION.record(elapsed_s, labels)
        logger.warning(
            "stream reopened", extra={"stage": self.stage, "reason": lost.reason, "duration_s": round(elapsed_s, 3)}
        )
