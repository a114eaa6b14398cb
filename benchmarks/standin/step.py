"""A simulated computation that takes a given time."""

import ctypes
import sys
import time
from collections.abc import Callable
from typing import TypeVar

Out = TypeVar("Out")
PR_SET_TIMERSLACK = 29


class Step:
    """A step of `step_s` seconds, including the work it does."""

    def __init__(self, step_s: float) -> None:
        self.step_s = step_s

    def run(self, work: Callable[[], Out]) -> Out:
        """Return the result of `work` once the step's time has passed."""
        end = time.monotonic() + self.step_s
        result = work()
        while (remaining_s := end - time.monotonic()) > 0:
            time.sleep(remaining_s)
        return result


def set_timer_slack() -> None:
    """Make sleeps of this thread, and of threads that it starts, end on time instead of 50 us later (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)
