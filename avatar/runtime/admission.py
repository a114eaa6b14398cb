"""What steps cost, and how many live streams a device can keep up with."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

from avatar import telemetry
from avatar.errors import NoCapacity
from avatar.types import BLOCK_S

Out = TypeVar("Out")

# Of a device's time, the share that live streams may need together. It leaves room for openings, prefills and offline
# streams, yet admits 22 streams of 20 ms (0.917) where the timer makes them up to 20.5 ms, and not 23 (0.958).
LIVE_SHARE = 0.94


@dataclass
class Usage:
    """What a stream has cost.

    busy_s: seconds of the device, all in all. Of the last step: waited_s, seconds in the device's queue, None where
    there is none; start_ns, end_ns, wall clock.
    """

    busy_s: float = 0.0
    waited_s: float | None = None
    start_ns: int = 0
    end_ns: int = 0

    @property
    def step_s(self) -> float:
        """Seconds of the last step, from its beginning to its end."""
        return (self.end_ns - self.start_ns) / 1e9

    def note(self, start_ns: int, elapsed_ns: int, waited_s: float | None = None) -> None:
        """A step was taken."""
        self.waited_s, self.start_ns, self.end_ns = waited_s, start_ns, start_ns + elapsed_ns
        self.busy_s += self.step_s

    def timed(self, work: Callable[..., Out], *arguments: Any) -> Out:
        """Do something and note what it cost."""
        start_ns, started = time.time_ns(), time.perf_counter_ns()
        out = work(*arguments)
        self.note(start_ns, time.perf_counter_ns() - started)
        return out


class Pace:
    """How long a block takes at a worker, judged by its last fifty."""

    def __init__(self) -> None:
        self._steps: deque[float] = deque(maxlen=50)

    def note(self, usage: Usage) -> None:
        """A block was made: count its step."""
        self._steps.append(usage.step_s)

    def measure(self, warm: Callable[[], int]) -> None:
        """Know a pace before the first stream.

        warm: makes blocks, and says how many; called twice, the first time cold.
        """
        warm()
        started_ns = time.perf_counter_ns()
        num_blocks = warm()
        step_ns = (time.perf_counter_ns() - started_ns) // num_blocks
        usage = Usage()
        usage.note(0, step_ns)
        self.note(usage)

    @property
    def step_s(self) -> float:
        """Seconds that nine of the last ten blocks stayed within; 0 before the first."""
        ranked = sorted(self._steps)
        return ranked[len(ranked) * 9 // 10] if ranked else 0.0

    @property
    def cost_s(self) -> float:
        """Seconds of the device that a block usually takes; 0 before the first.

        The median, and the lower one: prefills and cold starts are no reason to refuse a stream.
        """
        ranked = sorted(self._steps)
        return ranked[(len(ranked) - 1) // 2] if ranked else 0.0


class Load:
    """What the live streams of a device need of its time, at all the services that share it.

    A live stream needs a step in every block, for as long as it is open. Offline streams take what is left.
    """

    def __init__(self) -> None:
        self._services: list[tuple[Pace, int]] = []
        self._live: dict[int, tuple[str, Pace]] = {}
        self._num_streams = 0

    def serve(self, pace: Pace, num_streams: int) -> None:
        """A service computes on this device, and a session has so many streams at it."""
        self._services.append((pace, num_streams))

    def has_room(self, session_id: str, pace: Pace) -> bool:
        """One more live stream keeps time, and so do all others. A session that has the device to itself may try."""
        if all(session_id == each for each, _ in self._live.values()):
            return True
        return self._needed_s + pace.cost_s <= LIVE_SHARE * BLOCK_S

    @contextmanager
    def live(self, session_id: str, pace: Pace) -> Iterator[None]:
        """Count a live stream."""
        self._num_streams += 1
        number = self._num_streams
        self._live[number] = session_id, pace
        try:
            yield
        finally:
            del self._live[number]

    @property
    def room(self) -> int:
        """How many more live sessions the device can keep up with, if each has all its streams here."""
        session_s = sum(pace.cost_s * num_streams for pace, num_streams in self._services)
        if not session_s:
            return sys.maxsize
        free_s = LIVE_SHARE * BLOCK_S - self._needed_s
        return max(int(free_s // session_s), 0 if self._live else 1)

    @property
    def _needed_s(self) -> float:
        """Seconds of every block."""
        return sum(pace.cost_s for _, pace in self._live.values())


class AdmissionControl:
    """Admission of streams at one service of a worker.

    A stream over the limit is refused, never queued: a live session cannot wait. A live stream is also refused when it
    and the other live streams would need more of the device's time than there is.
    """

    def __init__(self, limit: int, service: str, load: Load, pace: Pace, num_levels: int = 1) -> None:
        """limit: streams of any kind. load: of the service's device. num_levels: streams of one session here."""
        self.active = 0
        self._limit = limit
        self._load, self._pace, self._num_levels = load, pace, num_levels
        self._labels = {"service": service}
        self._reported = 0
        load.serve(pace, num_levels)
        self.report_capacity()

    @property
    def capacity(self) -> int:
        """Streams at a time: the limit, or fewer if the device could not keep up with that many live ones."""
        return min(self._limit, self.active + self._load.room * self._num_levels)

    @contextmanager
    def admit(self, session_id: str, *, is_live: bool) -> Iterator[None]:
        """Count a stream as active while the body runs. NoCapacity if it cannot be admitted."""
        if self.active >= self._limit:
            raise NoCapacity(f"all {self._limit} streams of this worker are taken", retry_s=1.0)
        if is_live and not self._load.has_room(session_id, self._pace):
            raise NoCapacity("this worker's device has no time for another live stream", retry_s=1.0)
        self.active += 1
        telemetry.SESSIONS_ACTIVE.add(1, self._labels)
        try:
            with self._load.live(session_id, self._pace) if is_live else nullcontext():
                self.report_capacity()
                yield
        finally:
            self.active -= 1
            telemetry.SESSIONS_ACTIVE.add(-1, self._labels)
            self.report_capacity()

    def report_capacity(self) -> None:
        """Record the capacity as a metric if it has changed since the last report."""
        capacity = self.capacity
        telemetry.SESSIONS_CAPACITY.add(capacity - self._reported, self._labels)
        self._reported = capacity
