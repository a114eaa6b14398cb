"""Tests of avatar.runtime.admission: what steps cost, and how many live streams that allows."""

import sys
from contextlib import ExitStack

import pytest

from avatar.audio.alignment import BLOCK_SAMPLES, SAMPLE_RATE_HZ
from avatar.errors import NoCapacity
from avatar.runtime.admission import AdmissionControl, Load, Pace, Usage
from avatar.types import BLOCK_FRAMES, BLOCK_S


def paced(*steps_s: float) -> Pace:
    """The pace of a worker that has taken these steps."""
    pace = Pace()
    for step_s in steps_s:
        usage = Usage()
        usage.note(0, round(step_s * 1e9))
        pace.note(usage)
    return pace


def admitted(load: Load, pace: Pace, most: int = 100) -> int:
    """How many sessions of one stream each have room."""
    with ExitStack() as stack:
        for number in range(most):
            if not load.has_room(str(number), pace):
                return number
            stack.enter_context(load.live(str(number), pace))
    return most


def test_a_block_lasts_as_long_everywhere() -> None:
    assert BLOCK_S == BLOCK_SAMPLES / SAMPLE_RATE_HZ == BLOCK_FRAMES / 25


def test_nearly_all_of_a_devices_time_is_given_to_live_streams() -> None:
    assert [admitted(Load(), paced(step_s)) for step_s in (0.02, 0.0205, 0.12, 0.265, 0.4)] == [22, 22, 3, 1, 1]


def test_a_session_that_has_the_device_to_itself_may_try() -> None:
    """It is told when it falls behind; nobody else would."""
    load, slow = Load(), paced(1.0)
    with load.live("a", slow):
        assert load.has_room("a", slow), "its own second stream"
        assert not load.has_room("b", slow)
    assert load.has_room("b", slow)


def test_all_services_of_a_device_count() -> None:
    load, denoiser, decoder = Load(), paced(0.11), paced(0.05)
    load.serve(denoiser, 2)
    load.serve(decoder, 1)
    assert load.room == 1, "0.45 s of blocks hold one session of 0.27 s"
    with load.live("a", denoiser), load.live("a", denoiser), load.live("a", decoder):
        assert load.room == 0
        assert load.has_room("b", denoiser)
        with load.live("b", denoiser):
            assert load.has_room("b", decoder)
            assert not load.has_room("b", denoiser)


def test_a_device_that_has_not_stepped_yet_has_room() -> None:
    load = Load()
    load.serve(Pace(), 1)
    assert load.room == sys.maxsize
    assert admitted(load, Pace()) == 100


def test_cold_starts_and_prefills_refuse_nobody() -> None:
    for steps in ((0.02, 0.9), (0.9, 0.02, 0.02), (0.02, 0.9, 0.9, 0.02)):
        assert paced(*steps).cost_s == 0.02
    assert paced(0.02, 0.9).step_s == 0.9, "what is promised is what most blocks stay within"


def test_a_stream_over_the_limit_is_refused_until_another_ends() -> None:
    admission = AdmissionControl(2, "audio", Load(), Pace())
    with admission.admit("a", is_live=False):
        with admission.admit("b", is_live=False):
            with pytest.raises(NoCapacity, match="all 2 streams of this worker are taken") as refusal:
                admission.admit("c", is_live=False).__enter__()
            assert refusal.value.retry_s
            assert admission.active == 2
        with admission.admit("c", is_live=False):
            assert admission.active == 2


def test_a_live_stream_the_device_has_no_time_for_is_refused_until_another_ends() -> None:
    admission = AdmissionControl(8, "audio", Load(), paced(0.2))
    assert admission.capacity == 2, "0.45 s of every block hold two of 0.2 s"
    with admission.admit("a", is_live=True):
        with admission.admit("b", is_live=True):
            with pytest.raises(NoCapacity, match="no time for another live stream") as refusal:
                admission.admit("c", is_live=True).__enter__()
            assert refusal.value.retry_s
            assert admission.capacity == admission.active == 2
            with admission.admit("offline", is_live=False):
                assert admission.active == 3, "offline streams use the time that is left"
        with admission.admit("c", is_live=True):
            assert admission.active == 2
