"""A clock that tests set, an event loop whose time passes at once, and a wait until the event loop is idle."""

import asyncio
import selectors
from dataclasses import dataclass
from typing import Any


@dataclass
class Clock:
    """A callable clock: it returns `now_s`, in seconds, which only a test changes."""

    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


async def settled() -> None:
    """Let every task run until it waits for a timer or for I/O."""
    for _ in range(300):
        await asyncio.sleep(0)


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop that does not wait: its clock jumps to the next timer. For tasks that do no I/O.

    RuntimeError if all tasks wait and no timer is set, since they would wait for ever.
    """

    def __init__(self) -> None:
        self._now_s = 100.0
        super().__init__(_SkippingSelector(self))

    def time(self) -> float:
        return self._now_s

    def skip(self, seconds: float | None) -> None:
        """Let time pass; None if no timer is set."""
        if seconds is None:
            raise RuntimeError("all tasks wait, and no timer is set")
        self._now_s += seconds


class _SkippingSelector(selectors.SelectSelector):
    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        self._loop.skip(timeout)
        return super().select(0)
