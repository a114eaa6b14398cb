"""A step of a computation that is not there: it takes a given time."""

import ctypes
import sys
import time
from collections.abc import Callable
from typing import TypeVar

Out = TypeVar("Out")
PR_SET_TIMERSLACK = 29


class Step:
    """Takes `step_s` seconds, what it does compute included."""

    def __init__(self, step_s: float) -> None:
        self.step_s = step_s

    def take(self, work: Callable[[], Out]) -> Out:
        """What `work` gives, once the time is over."""
        until = time.monotonic() + self.step_s
        made = work()
        while (left := until - time.monotonic()) > 0:
            time.sleep(left)
        return made


def wake_in_time() -> None:
    """Have this thread's sleeps, and those of threads that it starts, end when they should, not 50 us later (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)
