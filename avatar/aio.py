"""Tasks that run beside a body or to their end, attempts without end, limits on waits, and a signal of changes."""

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, TypeVar

Result = TypeVar("Result")


@asynccontextmanager
async def background(coroutine: Coroutine[Any, Any, None]) -> AsyncGenerator[asyncio.Task[None], None]:
    """Run a coroutine while the body runs; cancel it, and wait until it has ended, when the body ends.

    Unlike a TaskGroup this does not cancel the body when the coroutine fails: the body decides what a failure means.
    So it can be used in async generators, whose body runs in whichever task asks for the next item.
    """
    task = asyncio.get_running_loop().create_task(coroutine)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # the body could read it; avoid asyncio's "exception was never retrieved"


async def uncancelled(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Return a coroutine's result. If the caller is cancelled meanwhile, the coroutine still runs to its end first."""
    task = asyncio.get_running_loop().create_task(coroutine)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # nobody else reads it
        raise


class Attempts:
    """Attempts at something that a loop tries for ever. An error in one is logged, and the loop goes on:

        while True:
            with attempts:
                await write()
            await asyncio.sleep(1)

    Of equal errors in a row only the first one is logged.
    """

    def __init__(
        self,
        logger: logging.Logger,
        failed: str,
        succeeded: str,
        expected: type[Exception] | tuple[type[Exception], ...] = (),
        **extra: str,
    ) -> None:
        """failed, succeeded: messages of the first failure, and of the first success after it. expected: errors that
        are no defect of our code, which has a traceback. extra: fields of the log.
        """
        self._logger, self._failed, self._succeeded = logger, failed, succeeded
        self._expected, self._extra = expected, extra
        self._failure: type[BaseException] | None = None  # of the last attempt

    @property
    def has_failed(self) -> bool:
        """True if the last attempt has failed."""
        return self._failure is not None

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        failure, self._failure = self._failure, kind
        if error is None:
            if failure:
                self._logger.info(self._succeeded, extra=self._extra)
            return False
        if not isinstance(error, Exception):  # a cancellation
            return False
        if kind is not failure:
            is_expected = isinstance(error, self._expected)
            level = logging.WARNING if is_expected else logging.ERROR
            extra = {**self._extra, "problem": str(error)}
            self._logger.log(level, self._failed, extra=extra, exc_info=None if is_expected else error)
        return True


class WaitLimit:
    """A limit on waits that follow each other, with one timer for all of them.

        with limit:
            limit.set(2.0)
            await ...  # TimeoutError after 2 s

    asyncio.timeout sets and cancels a timer for each wait, which costs as much as a message. Here a timer that is early
    sets itself anew, so it runs out once per limit and not once per wait.
    """

    def __init__(self) -> None:
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = math.inf
        self._waiting: asyncio.Task[Any] | None = None
        self._num_cancelled = 0  # requests to cancel the waiting task, before the wait
        self._until_s = math.inf
        self._is_over = False

    @property
    def is_unlimited(self) -> bool:
        """True during a wait that has no limit."""
        return self._waiting is not None and self._until_s == math.inf

    def set(self, seconds: float) -> None:
        """Limit the current wait, if there is one, from now on; replaces an earlier limit."""
        if self._waiting is None:
            return
        self._until_s = asyncio.get_running_loop().time() + seconds
        if self._timer_s > self._until_s:
            self._start_timer()

    def __enter__(self) -> None:
        self._waiting = asyncio.current_task()
        assert self._waiting is not None
        self._num_cancelled = self._waiting.cancelling()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        waiting, self._waiting, self._until_s = self._waiting, None, math.inf
        if self._is_over and waiting is not None:
            self._is_over = False
            if waiting.uncancel() <= self._num_cancelled and kind is asyncio.CancelledError:
                raise TimeoutError from error

    def _start_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_s = self._until_s
        self._timer = asyncio.get_running_loop().call_at(self._timer_s, self._look)

    def _look(self) -> None:
        """End the wait if its time is over; set the timer anew if the limit has moved."""
        self._timer, self._timer_s = None, math.inf
        if self._waiting is None or self._until_s == math.inf or self._is_over:
            return
        if asyncio.get_running_loop().time() < self._until_s:
            self._start_timer()
        else:
            self._is_over = True
            self._waiting.cancel()


class ChangeSignal:
    """Wakes tasks that wait for a predicate to become true. Unlike asyncio.Condition, `notify` needs no lock."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Wake all waiting tasks to evaluate their predicate."""
        self._event.set()
        self._event = asyncio.Event()

    async def wait_until(self, predicate: Callable[[], object]) -> None:
        """Wait until a predicate is true."""
        while not predicate():
            await self._event.wait()
