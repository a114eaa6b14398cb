"""Admission control: how many streams a worker accepts.

    a service's step times (`StepTimes`) -> time its device needs for live streams (`DeviceLoad`) -> accept or refuse

A live stream needs one step of its service in every block, for as long as it is open: the share of the device's time
that the median of the measured steps is of a block's duration. A device keeps up with its live streams if their shares
add up to LIVE_SHARE at most.
`AdmissionControl` refuses a stream over the worker's limit, and a live stream that its device has no time for. Offline
streams count towards the limit only: they use the time that is left. A session that moves to another gateway keeps its
slots: at a full worker its new stream replaces the old one.

A stream of a denoiser or of a decoder also reserves the memory that its state takes at most, prefills included
(`DeviceMemory`). So a lack of memory refuses a stream before it is opened, and ends none that is open.
"""

import asyncio
import logging
import math
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from statistics import median_low

from avatar import telemetry
from avatar.errors import NoCapacity, SessionBusy
from avatar.runtime.device_memory import DeviceMemory, Reservation

logger = logging.getLogger(__name__)

# Share of a device's time that live streams may need. The rest is for openings, prefills and offline streams. 22
# streams of 20 ms fit (0.917), also if sleeps make a step last 20.5 ms (0.94); 23 do not (0.958).
LIVE_SHARE = 0.94


class StepTimes(deque[float]):
    """Durations of a service's last fifty steps, in seconds.

    block_s: duration of a block, in seconds.
    """

    def __init__(self, block_s: float) -> None:
        super().__init__(maxlen=50)
        self.block_s = block_s

    @property
    def p90_s(self) -> float:
        """90th percentile; 0 before the first step."""
        return sorted(self)[len(self) * 9 // 10] if self else 0.0

    @property
    def median_s(self) -> float:
        """Lower median, so that cold starts and prefills refuse no stream; 0 before the first step."""
        return median_low(self) if self else 0.0

    @property
    def share(self) -> float:
        """Share of a device's time that a live stream needs, by the median step; over 1 if it cannot keep up."""
        return self.median_s / self.block_s


def _unique_name() -> str:
    return secrets.token_hex(8)


@dataclass(frozen=True)
class Device:
    """A device, which the queues of several processes may share.

    name: the same in all processes that compute on it; by default no other process does. num_cores: of a CPU; 1 for a
    GPU, which runs one step at a time. num_threads: cores that a step keeps busy.
    """

    name: str = field(default_factory=_unique_name)
    num_cores: int = 1
    num_threads: int = 1


class DeviceLoad:
    """Time of a device's queue that its live streams need, over all services that share it.

    queue: name of the queue, which no other has. memory: of the device, for the same streams.
    """

    def __init__(self, device: Device | None = None, memory: DeviceMemory | None = None) -> None:
        self.device = device or Device()
        self.memory = memory or DeviceMemory()
        self.queue = _unique_name()
        self._services: list[tuple[StepTimes, int]] = []
        self._listeners: list[Callable[[], None]] = []
        self._live_streams: list[tuple[str, StepTimes]] = []

    def add_service(self, step_times: StepTimes, num_streams: int, on_change: Callable[[], None] | None = None) -> None:
        """Add a service of this device.

        num_streams: streams that each session has there. on_change: called when a stream of any of the services is
        accepted or ends, which changes the capacity of all.
        """
        self._services.append((step_times, num_streams))
        if on_change:
            self._listeners.append(on_change)

    def notify(self) -> None:
        """Call the services' `on_change`."""
        for each in self._listeners:
            each()

    def has_time_for(self, session_id: str, step_times: StepTimes) -> bool:
        """Return whether the device keeps up with one more live stream.

        True for a session that has the device to itself: it delays no other, and its client is told when it is late.
        """
        if all(session_id == each for each, _ in self._live_streams):
            return True
        return self.live_share + step_times.share <= LIVE_SHARE

    @contextmanager
    def live_stream(self, session_id: str, step_times: StepTimes) -> Iterator[None]:
        """Count a live stream while the body runs."""
        stream = session_id, step_times
        self._live_streams.append(stream)
        try:
            yield
        finally:
            # By identity: step times are equal if their numbers are.
            self._live_streams = [each for each in self._live_streams if each is not stream]

    @property
    def num_free_sessions(self) -> int:
        """Number of further live sessions that the device keeps up with, each with all its streams here."""
        if not (session_share := self.session_share):
            return sys.maxsize
        free_share = LIVE_SHARE - self.live_share
        return max(int(free_share // session_share), 0 if self._live_streams else 1)

    @property
    def session_share(self) -> float:
        """Share of the queue's time that a live session needs with all its streams here; over 1 if it is too slow."""
        return sum(step_times.share * num_streams for step_times, num_streams in self._services)

    @property
    def live_share(self) -> float:
        """Share of the queue's time that the open live streams need."""
        return sum(step_times.share for _, step_times in self._live_streams)


class _Stream:
    """An accepted stream.

    slot: counts it until it closes. claimed_us: see `AdmissionControl.admit`. reservation: of its memory, while it is
    open. is_replaced: it ends for another stream of its session.
    """

    def __init__(self, slot: ExitStack, claimed_us: int, reservation: Reservation) -> None:
        self.slot, self.claimed_us = slot, claimed_us
        self.reservation: Reservation | None = reservation
        self.is_replaced = False
        self._task = asyncio.current_task()
        self._ended = asyncio.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the stream's body, in the task that accepted it. SessionBusy if the stream is replaced."""
        assert self._task
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):  # the latter while the generator's answer is being sent
            if not self.is_replaced or self._task.uncancel():
                raise
            raise SessionBusy("another stream of the session has taken this one's slot") from None
        finally:
            self._ended.set()

    async def replace(self) -> ExitStack:
        """End the stream, and return its slot, which nobody else gets meanwhile, once its state is freed."""
        slot = self.slot.pop_all()
        self.is_replaced = True
        assert self._task
        self._task.cancel()
        try:
            await self._ended.wait()
        except BaseException:
            slot.close()
            raise
        return slot


class AdmissionControl:
    """Admission of streams at one service of a worker.

    A stream over the limit is refused, never queued: a live session cannot wait. A live stream is also refused when it
    and the other live streams would need more of the device's time than there is.

    active: streams that are open. limit: streams of any kind at a time. step_times: of the service's steps; its streams
    add them. stream_bytes: memory of the smallest stream, 0 if that is not known. on_change: called when a stream is
    accepted or ends, here or at another service of the device.
    """

    def __init__(self, limit: int, service: str, load: DeviceLoad, block_s: float, num_levels: int = 1) -> None:
        """limit: streams of any kind. load: of the service's device. block_s: duration of a block.

        num_levels: streams of one session here.
        """
        self.active = 0
        self.limit = limit
        self.step_times = StepTimes(block_s)
        self.stream_bytes = 0
        self.on_change: Callable[[], None] = lambda: None
        self._load, self._num_levels = load, num_levels
        self._labels = {"service": service}
        self._reported = 0
        # By session and level: the latest stream.
        self._streams: dict[tuple[str, int], _Stream] = {}
        load.add_service(self.step_times, num_levels, self._load_changed)
        self._report_capacity()

    def measure(self, warm: Callable[[], int]) -> None:
        """Measure a first step time before the first stream.

        warm: computes blocks, and returns their number. It is called twice: the first time is cold, and not counted.
        """
        warm()
        started_ns = time.perf_counter_ns()
        num_blocks = warm()
        step_s = (time.perf_counter_ns() - started_ns) / num_blocks / 1e9
        self.step_times.append(step_s)
        if step_s > self.step_times.block_s:
            facts = {**self._labels, "step_s": round(step_s, 3), "block_s": self.step_times.block_s}
            hint = "live streams lag: serve on a faster device, or smaller videos"
            logger.warning("a step takes longer than its block lasts", extra={**facts, "hint": hint})
        self._report_capacity()

    @property
    def capacity(self) -> int:
        """Streams at a time: the limit, or fewer if the device could not keep up with that many live ones.

        Also fewer if its memory is not enough for that many of the smallest ones: a larger one may be refused, and
        must not close the worker to the others.
        """
        free = self._load.num_free_sessions * self._num_levels
        if self.stream_bytes and (free_bytes := self._load.memory.free_bytes) < math.inf:
            free = min(free, max(0, int(free_bytes // self.stream_bytes)))
        return min(self.limit, self.active + free)

    def add_size(self, num_bytes: int) -> None:
        """Count streams of this memory among those that the worker may accept."""
        self.stream_bytes = min(self.stream_bytes or num_bytes, num_bytes)

    @contextmanager
    def accept(
        self, session_id: str, *, is_live: bool, max_active: int | None = None, num_bytes: int = 0
    ) -> Iterator[Reservation]:
        """Count a stream as active while the body runs. NoCapacity, with the worker's real numbers, if it is refused;
        without numbers if the worker has memory for smaller streams alone.

        max_active: streams that the caller believes to be open at most. It then selects a worker by real numbers.
        num_bytes: memory that the stream takes at most; it is reserved, and the context is its reservation.
        """
        if self.active >= self.limit:
            raise self._full(f"all {self.limit} streams of this worker are taken")
        if is_live and not self._load.has_time_for(session_id, self.step_times):
            raise self._full("this worker's device has no time for another live stream")
        memory = self._load.memory
        if num_bytes > (free_bytes := memory.free_bytes):
            free = f"{max(0.0, free_bytes) / 1e9:.2f} GB of memory"
            message = f"this worker's device has {free} for streams, and this one needs {num_bytes / 1e9:.2f}"
            raise self._full(message, with_room=False)
        if max_active is not None and self.active > max_active:
            raise self._full(f"this worker has {self.active} streams, and not at most {max_active}")
        self.active += 1
        self.add_size(num_bytes)
        telemetry.SESSIONS_ACTIVE.add(1, self._labels)
        reservation = memory.reserve(num_bytes)
        try:
            live = self._load.live_stream(session_id, self.step_times) if is_live else nullcontext()
            with live:
                self._load.notify()
                yield reservation
        finally:
            del reservation  # a traceback may keep this frame
            self.active -= 1
            telemetry.SESSIONS_ACTIVE.add(-1, self._labels)
            self._load.notify()

    def _full(self, message: str, *, with_room: bool = True) -> NoCapacity:
        """Return a refusal. with_room: give the worker's numbers also if they have room, so the caller tries again."""
        active, capacity = self.active, self.capacity
        has_numbers = with_room or active >= capacity
        numbers = {"active": str(active), "capacity": str(capacity)} if has_numbers else {}
        return NoCapacity(message, metadata=numbers, retry_s=1.0)

    async def admit(
        self,
        session_id: str,
        *,
        is_live: bool,
        max_active: int | None = None,
        claimed_us: int = 0,
        level: int = 0,
        num_bytes: int = 0,
    ) -> AbstractContextManager[Reservation]:
        """Accept a session's stream at a level: the returned context's body runs it. Raises as `accept` does.

        claimed_us: when the caller acquired the session's claim, 0 for never. In place of a refusal, the session's
        other stream at this level, if it has no later claim and no less memory, is ended and gives its slot: its task
        is cancelled, and its context raises SessionBusy.
        """
        slot, key = ExitStack(), (session_id, level)
        try:
            accepted = self.accept(session_id, is_live=is_live, max_active=max_active, num_bytes=num_bytes)
            reservation = slot.enter_context(accepted)
        except NoCapacity:
            former = self._streams.get(key)
            if former is None or not 0 < claimed_us >= former.claimed_us:
                raise
            assert former.reservation
            if num_bytes > former.reservation.num_bytes:
                raise
            reservation = former.reservation
            del self._streams[key]  # before any wait: it has one slot to give
            slot = await former.replace()
        return self._run(key, slot, claimed_us, reservation)

    @contextmanager
    def _run(
        self, key: tuple[str, int], slot: ExitStack, claimed_us: int, reservation: Reservation
    ) -> Iterator[Reservation]:
        with slot:
            stream = self._streams[key] = _Stream(slot, claimed_us, reservation)
            try:
                with stream.running():
                    yield reservation
            finally:
                stream.reservation = None
                del reservation  # as above
                if self._streams.get(key) is stream:
                    del self._streams[key]

    def _load_changed(self) -> None:
        self._report_capacity()
        self.on_change()

    def _report_capacity(self) -> None:
        """Record the capacity as a metric if it has changed since the last report."""
        capacity = self.capacity
        telemetry.SESSIONS_CAPACITY.add(capacity - self._reported, self._labels)
        self._reported = capacity
