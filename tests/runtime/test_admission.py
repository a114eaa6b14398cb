"""Tests of avatar.runtime.admission: step times, and the streams that are accepted by them."""

import asyncio
import sys
from contextlib import ExitStack
from itertools import chain, repeat
from types import SimpleNamespace

import pytest

from avatar.aio import background
from avatar.errors import NoCapacity, SessionBusy
from avatar.runtime.admission import AdmissionControl, Device, DeviceLoad, StepTimes
from avatar.runtime.device_memory import DeviceMemory

BLOCK_S = 0.48


def step_times(*steps_s: float, block_s: float = BLOCK_S) -> StepTimes:
    times = StepTimes(block_s)
    for step_s in steps_s:
        times.append(step_s)
    return times


def num_accepted(load: DeviceLoad, times: StepTimes, most: int = 100) -> int:
    """Return how many sessions of one live stream each the device has time for."""
    with ExitStack() as stack:
        for number in range(most):
            if not load.has_time_for(str(number), times):
                return number
            stack.enter_context(load.live_stream(str(number), times))
    return most


def test_live_streams_get_nearly_all_of_a_devices_time() -> None:
    steps_s = (0.02, 0.0205, 0.12, 0.265, 0.4)
    assert [num_accepted(DeviceLoad(), step_times(step_s)) for step_s in steps_s] == [22, 22, 3, 1, 1]


def test_shorter_blocks_need_a_step_more_often() -> None:
    steps_s = (0.02, 0.0205, 0.12, 0.265)
    assert [num_accepted(DeviceLoad(), step_times(step_s, block_s=0.16)) for step_s in steps_s] == [7, 7, 1, 1]
    load = DeviceLoad()
    with load.live_stream("a", step_times(0.24)), load.live_stream("a", step_times(0.04, block_s=0.16)):
        assert load.has_time_for("b", step_times(0.08)), "half, a quarter and a sixth of the time"
        assert not load.has_time_for("b", step_times(0.1))


def test_a_session_alone_at_a_device_is_never_refused() -> None:
    load, slow = DeviceLoad(), step_times(1.0)
    with load.live_stream("a", slow):
        assert load.has_time_for("a", slow), "its own second stream"
        assert not load.has_time_for("b", slow)
    assert load.has_time_for("b", slow)


def test_all_services_of_a_device_count() -> None:
    load, denoiser, decoder = DeviceLoad(), step_times(0.11), step_times(0.05)
    load.add_service(denoiser, 2)
    load.add_service(decoder, 1)
    assert load.num_free_sessions == 1, "one session of 0.27 s fits into 0.45 s of every block"
    with load.live_stream("a", denoiser), load.live_stream("a", denoiser), load.live_stream("a", decoder):
        assert load.num_free_sessions == 0
        assert load.has_time_for("b", denoiser)
        with load.live_stream("b", denoiser):
            assert load.has_time_for("b", decoder)
            assert not load.has_time_for("b", denoiser)


def test_a_stream_changes_the_capacity_of_all_services_of_its_device() -> None:
    load, seen = DeviceLoad(), list[int]()
    first, second = AdmissionControl(8, "audio", load, BLOCK_S), AdmissionControl(8, "vae", load, BLOCK_S)
    first.step_times.append(0.3)
    second.step_times.append(0.3)
    second.on_change = lambda: seen.append(second.capacity)
    with first.accept("a", is_live=True):
        assert seen == [0], "the device is too slow for two"
    assert seen == [0, 1]


def test_a_queue_reports_the_share_of_one_session_and_of_the_open_live_streams() -> None:
    load, denoiser, decoder = DeviceLoad(), step_times(0.12), step_times(0.06)
    load.add_service(denoiser, 2)
    load.add_service(decoder, 1)
    assert load.session_share == pytest.approx(0.3 / BLOCK_S)
    assert load.live_share == 0
    with load.live_stream("a", denoiser), load.live_stream("b", decoder):
        assert load.live_share == pytest.approx(0.18 / BLOCK_S)
    assert load.live_share == 0


def test_queues_share_a_device_only_if_it_is_named() -> None:
    first, second = DeviceLoad(Device("gpu")), DeviceLoad(Device("gpu"))
    assert first.device == second.device
    assert first.queue != second.queue
    assert DeviceLoad().device != DeviceLoad().device


def test_a_device_without_measured_steps_refuses_no_stream() -> None:
    load = DeviceLoad()
    load.add_service(step_times(), 1)
    assert load.num_free_sessions == sys.maxsize
    assert num_accepted(load, step_times()) == 100


def test_cold_starts_and_prefills_refuse_no_stream() -> None:
    for steps in ((0.02, 0.9), (0.9, 0.02, 0.02), (0.02, 0.9, 0.9, 0.02)):
        assert step_times(*steps).median_s == 0.02
    assert step_times(0.02, 0.9).p90_s == 0.9


def test_a_stream_over_the_limit_is_refused_until_another_ends() -> None:
    admission = AdmissionControl(2, "audio", DeviceLoad(), BLOCK_S)
    with admission.accept("a", is_live=False):
        with admission.accept("b", is_live=False):
            with pytest.raises(NoCapacity, match="all 2 streams of this worker are taken") as refusal:
                admission.accept("c", is_live=False).__enter__()
            assert refusal.value.retry_s
            assert admission.active == 2
        with admission.accept("c", is_live=False):
            assert admission.active == 2


def test_a_live_stream_the_device_has_no_time_for_is_refused_until_another_ends() -> None:
    admission = AdmissionControl(8, "audio", DeviceLoad(), BLOCK_S)
    admission.step_times.append(0.2)
    assert admission.capacity == 2, "two of 0.2 s fit into 0.45 s of every block"
    with admission.accept("a", is_live=True):
        with admission.accept("b", is_live=True):
            with pytest.raises(NoCapacity, match="no time for another live stream") as refusal:
                admission.accept("c", is_live=True).__enter__()
            assert refusal.value.retry_s
            assert admission.capacity == admission.active == 2
            with admission.accept("offline", is_live=False):
                assert admission.active == 3, "offline streams use the time that is left"
        with admission.accept("c", is_live=True):
            assert admission.active == 2


def test_the_first_step_time_is_measured_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(s=0.0)
    monkeypatch.setattr("avatar.runtime.admission.time.perf_counter_ns", lambda: round(now.s * 1e9))
    durations_s = iter((8.0, 0.4))

    def warm() -> int:
        now.s += next(durations_s)
        return 4

    admission = AdmissionControl(8, "audio", DeviceLoad(), BLOCK_S)
    admission.measure(warm)
    assert admission.step_times.median_s == pytest.approx(0.1)


def test_a_refusal_tells_the_real_numbers_and_a_belief_of_fewer_streams_is_refused() -> None:
    admission = AdmissionControl(3, "denoiser", DeviceLoad(), BLOCK_S)
    changes: list[int] = []
    admission.on_change = lambda: changes.append(admission.active)
    with admission.accept("a", is_live=False, max_active=0), admission.accept("b", is_live=False, max_active=1):
        with pytest.raises(NoCapacity, match="2 streams, and not at most 1") as refusal:
            admission.accept("c", is_live=False, max_active=1).__enter__()
        assert refusal.value.metadata == {"active": "2", "capacity": "3"}
        with admission.accept("c", is_live=False, max_active=2):
            with pytest.raises(NoCapacity, match="all 3") as refusal:
                admission.accept("d", is_live=False).__enter__()
            assert refusal.value.metadata == {"active": "3", "capacity": "3"}
    assert changes == [1, 2, 3, 2, 1, 0]


async def stream(admission: AdmissionControl, session_id: str, claimed_us: int = 0) -> None:
    """Run a live stream for ever."""
    with await admission.admit(session_id, is_live=True, claimed_us=claimed_us):
        await asyncio.Event().wait()


async def test_a_session_that_moves_keeps_its_slot_at_a_full_worker() -> None:
    admission = AdmissionControl(1, "audio", DeviceLoad(), BLOCK_S)
    async with background(stream(admission, "a", 10)) as former:
        await asyncio.sleep(0)
        others = [stream(admission, "b"), stream(admission, "b", 11), stream(admission, "a"), stream(admission, "a", 9)]
        for other in others:
            with pytest.raises(NoCapacity):
                await other
        async with background(stream(admission, "a", 11)) as second:
            with pytest.raises(SessionBusy):
                await former
            with pytest.raises(NoCapacity):
                await stream(admission, "b")
            assert (admission.active, second.done()) == (1, False)
    assert admission.active == 0


async def test_a_session_that_moves_keeps_its_time_at_a_full_device() -> None:
    load = DeviceLoad()
    slow = AdmissionControl(8, "audio", load, BLOCK_S)
    slow.step_times.append(0.9 * BLOCK_S)
    with load.live_stream("other", StepTimes(BLOCK_S)):
        async with background(stream(slow, "a")) as former:
            await asyncio.sleep(0)
            with pytest.raises(NoCapacity):
                await stream(slow, "a")
            async with background(stream(slow, "a", 11)) as second:
                with pytest.raises(SessionBusy):
                    await former
                assert not second.done()


async def test_a_session_that_moves_leaves_its_old_stream_where_there_is_room() -> None:
    admission = AdmissionControl(2, "audio", DeviceLoad(), BLOCK_S)
    async with background(stream(admission, "a")) as former, background(stream(admission, "a", 11)):
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (admission.active, former.done()) == (2, False)


async def test_a_stream_gets_its_slot_when_the_state_of_the_one_before_is_freed() -> None:
    admission, can_end = AdmissionControl(1, "audio", DeviceLoad(), BLOCK_S), asyncio.Event()

    async def slow_to_end() -> None:
        with await admission.admit("a", is_live=True):
            try:
                await asyncio.Event().wait()
            finally:
                await can_end.wait()

    async with background(slow_to_end()), asyncio.timeout(5):
        await asyncio.sleep(0)
        opening = asyncio.ensure_future(admission.admit("a", is_live=True, claimed_us=11))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not opening.done()
        with pytest.raises(NoCapacity):
            await admission.admit("b", is_live=True)
        can_end.set()
        with await opening:
            assert admission.active == 1


async def test_a_take_over_that_is_given_up_frees_the_slot() -> None:
    admission = AdmissionControl(1, "audio", DeviceLoad(), BLOCK_S)
    async with background(stream(admission, "a")) as former:
        await asyncio.sleep(0)
        taking_over = asyncio.ensure_future(stream(admission, "a", 11))
        await asyncio.sleep(0)
        taking_over.cancel()
        await asyncio.wait({former, taking_over})
        assert admission.active == 0


def test_a_stream_that_the_memory_is_not_enough_for_is_refused() -> None:
    load = DeviceLoad(memory=DeviceMemory(lambda: 10e9))
    admission = AdmissionControl(8, "denoiser", load, BLOCK_S)
    with admission.accept("a", is_live=False, num_bytes=6_000_000_000):
        refusal = "4.00 GB of memory for streams, and this one needs 5.00"
        with (
            pytest.raises(NoCapacity, match=refusal) as refused,
            admission.accept("b", is_live=False, num_bytes=5_000_000_000),
        ):
            pass
        assert refused.value.metadata == {"active": "1", "capacity": "1"}
        with admission.accept("c", is_live=False, num_bytes=4_000_000_000):
            assert load.memory.free_bytes == 0
    assert load.memory.reserved_bytes == 0


def test_a_stream_too_large_for_the_memory_leaves_the_capacity_to_smaller_ones() -> None:
    admission = AdmissionControl(8, "denoiser", DeviceLoad(memory=DeviceMemory(lambda: 10.0)), BLOCK_S)
    admission.add_size(4)
    with (
        pytest.raises(NoCapacity) as refused,
        admission.accept("a", is_live=False, num_bytes=11),
    ):
        pass
    assert refused.value.metadata == {}, "numbers that have room would make the caller try again"
    assert admission.capacity == 2


def test_capacity_is_the_less_of_memory_and_time() -> None:
    load = DeviceLoad(memory=DeviceMemory(lambda: 10e9))
    admission = AdmissionControl(8, "denoiser", load, BLOCK_S)
    assert admission.capacity == 8, "nothing is known of either"
    for num_bytes in (5_000_000_000, 3_000_000_000):
        admission.add_size(num_bytes)
    assert admission.capacity == 3
    with admission.accept("a", is_live=False, num_bytes=4_000_000_000):
        assert admission.capacity == 3, "the open one, and two of the smallest"
    admission.step_times.append(0.4)
    assert admission.capacity == 1


def test_free_memory_is_measured_while_there_are_no_streams() -> None:
    free = [10.0, 8.0, 5.0]
    memory = DeviceMemory(lambda: free.pop(0))
    assert memory.free_bytes == 10
    assert memory.free_bytes == 8
    reservation = memory.reserve(2)
    assert memory.free_bytes == 6, "of the 8 before the stream"
    del reservation
    assert memory.free_bytes == 5


def test_memory_is_measured_once_for_a_stream() -> None:
    free = chain([10.0], repeat(5.0))  # another process allocates in between
    load = DeviceLoad(memory=DeviceMemory(lambda: next(free)))
    admission = AdmissionControl(8, "denoiser", load, BLOCK_S)
    with admission.accept("a", is_live=False, num_bytes=8):
        assert load.memory.reserved_bytes == 8
    assert load.memory.reserved_bytes == 0


def test_memory_is_reserved_until_the_state_is_freed() -> None:
    load = DeviceLoad(memory=DeviceMemory(lambda: 10.0))
    admission = AdmissionControl(8, "denoiser", load, BLOCK_S)
    state = {"cache"}
    with admission.accept("a", is_live=False, num_bytes=8) as reservation:
        reservation.keep_for(state)
        del reservation
    assert (admission.active, load.memory.reserved_bytes) == (0, 8)
    del state
    assert load.memory.reserved_bytes == 0


async def test_a_stream_takes_over_no_slot_of_less_memory() -> None:
    load = DeviceLoad(memory=DeviceMemory(lambda: 10.0))
    admission = AdmissionControl(8, "denoiser", load, BLOCK_S)

    async def run() -> None:
        with await admission.admit("a", is_live=True, claimed_us=1, num_bytes=8):
            await asyncio.Event().wait()

    async with background(run()) as former:
        await asyncio.sleep(0)
        with pytest.raises(NoCapacity):
            await admission.admit("a", is_live=True, claimed_us=2, num_bytes=9)
        assert (load.memory.reserved_bytes, former.done()) == (8, False)


async def test_a_session_that_moves_keeps_its_memory() -> None:
    load = DeviceLoad(memory=DeviceMemory(lambda: 10.0))
    admission = AdmissionControl(8, "denoiser", load, BLOCK_S)

    async def run(claimed_us: int) -> None:
        with await admission.admit("a", is_live=True, claimed_us=claimed_us, num_bytes=8):
            await asyncio.Event().wait()

    async with background(run(1)) as former:
        await asyncio.sleep(0)
        async with background(run(2)) as second:
            with pytest.raises(SessionBusy):
                await former
            assert (load.memory.reserved_bytes, second.done()) == (8, False)
    assert load.memory.reserved_bytes == 0
