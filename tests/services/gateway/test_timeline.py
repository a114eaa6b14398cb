"""Tests of services.gateway.stream.timeline."""

import pytest

from services.gateway.stream.timeline import MARGIN_S, TOLERANCE_S, MediaGrid, Timeline
from tests.services.gateway.clock import Clock

RATES = [8000, 11025, 12345, 16000, 22050, 44100, 48000]
GRID = MediaGrid(16000, 25, 12)
BLOCK_S = 0.48
LATENCY_S = 0.2


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timeline(clock: Clock) -> Timeline:
    """A timeline whose frame 0 is due at 100 s."""
    timeline = Timeline(GRID, LATENCY_S, clock)
    timeline.restart(0)
    return timeline


@pytest.mark.parametrize("rate_hz", RATES)
def test_audio_and_frames_do_not_drift_apart_in_an_hour(rate_hz: int) -> None:
    grid = MediaGrid(rate_hz, 25, 12)
    assert grid.sample(25 * 3600) == rate_hz * 3600
    frames = [grid.sample(frame + 1) - grid.sample(frame) for frame in range(25 * 3600)]
    assert sum(frames) == rate_hz * 3600
    assert max(frames) - min(frames) <= 1
    assert all(abs(grid.duration_us(grid.sample(frame)) - frame * 40_000) < 130 for frame in range(0, 90000, 997))


def test_a_restart_makes_a_frame_due_now_and_the_others_follow_one_by_one(timeline: Timeline, clock: Clock) -> None:
    assert [timeline.due_s(frame) for frame in (0, 1, 12)] == pytest.approx([100.0, 100.04, 100.48])
    clock.now_s = 130.0
    timeline.restart(50)
    assert timeline.due_s(50) == pytest.approx(130.0)


def test_reading_moves_nothing(timeline: Timeline, clock: Clock) -> None:
    clock.now_s += 10.0
    before = timeline.due_s(12), timeline.start_by_s(12), timeline.lead_s
    assert (timeline.due_s(12), timeline.start_by_s(12), timeline.lead_s) == before


def test_a_block_starts_the_reported_latency_and_a_margin_before_it_is_due(timeline: Timeline) -> None:
    assert timeline.lead_s == pytest.approx(LATENCY_S + MARGIN_S)
    assert timeline.start_by_s(24) == pytest.approx(timeline.due_s(24) - LATENCY_S - MARGIN_S)


def test_the_lead_follows_the_second_longest_of_the_last_eight_latencies(timeline: Timeline) -> None:
    timeline.block_arrived(0, 0.4)
    assert timeline.lead_s == pytest.approx(LATENCY_S + MARGIN_S), "a single slow block changes nothing"
    timeline.block_arrived(12, 0.3)
    assert timeline.lead_s == pytest.approx(0.3 + MARGIN_S)
    timeline.block_arrived(24, 0.35)
    assert timeline.lead_s == pytest.approx(0.35 + MARGIN_S)
    for number in range(3, 11):
        timeline.block_arrived(12 * number, 0.25)
    assert timeline.lead_s == pytest.approx(0.25 + MARGIN_S), "the slow blocks are forgotten"


@pytest.mark.parametrize(("latency_s", "growth_s"), [(0.01, 0.0), (5.0, BLOCK_S)])
def test_the_lead_never_shrinks_and_grows_by_a_block_at_most(
    timeline: Timeline, latency_s: float, growth_s: float
) -> None:
    for number in range(8):
        timeline.block_arrived(12 * number, latency_s)
    assert timeline.lead_s == pytest.approx(LATENCY_S + growth_s + MARGIN_S)


def test_the_first_block_after_a_restart_is_not_late_and_moves_its_frame_back(timeline: Timeline) -> None:
    assert timeline.start_block(0) == 0.0
    assert timeline.due_s(0) == pytest.approx(100.0 + LATENCY_S + MARGIN_S)


@pytest.mark.parametrize("late_s", [0.1, -0.1])
def test_a_block_that_starts_late_moves_its_frame_back_and_an_early_one_does_not(
    timeline: Timeline, clock: Clock, late_s: float
) -> None:
    timeline.start_block(0)
    clock.now_s = timeline.start_by_s(12) + late_s
    due_s = timeline.due_s(12)
    assert timeline.start_block(12) == pytest.approx(late_s)
    assert timeline.due_s(12) == pytest.approx(due_s + max(0.0, late_s))


def test_a_late_arrival_moves_all_later_frames_back(timeline: Timeline, clock: Clock) -> None:
    clock.now_s = timeline.due_s(12) + 0.2
    assert timeline.block_arrived(12, 0.3) == pytest.approx(0.2)
    assert timeline.due_s(24) == pytest.approx(100.0 + 0.96 + 0.2)
    clock.now_s = timeline.due_s(24)
    assert timeline.block_arrived(24, 0.3) == pytest.approx(0.0)


def test_a_held_frame_is_due_no_earlier_than_now_and_its_arrival_tells_how_late_it_was(
    timeline: Timeline, clock: Clock
) -> None:
    timeline.hold(12)
    assert timeline.due_s(12) == pytest.approx(100.48), "it is not overdue yet"
    clock.now_s = timeline.due_s(12) + 0.1
    timeline.hold(12)
    clock.now_s += 0.2
    timeline.hold(12)
    assert timeline.due_s(12) == pytest.approx(clock.now_s)
    assert timeline.block_arrived(12, 0.5) == pytest.approx(0.3)
    clock.now_s = timeline.due_s(24)
    assert timeline.block_arrived(24, 0.5) == pytest.approx(0.0), "what was held is counted once"


def test_late_blocks_are_counted_until_one_is_in_time(timeline: Timeline, clock: Clock) -> None:
    for number in (1, 2):
        clock.now_s = timeline.due_s(12 * number) + TOLERANCE_S + 0.01
        timeline.block_arrived(12 * number, 0.3)
        assert timeline.num_late == number
    clock.now_s = timeline.due_s(36) + TOLERANCE_S - 0.01
    timeline.block_arrived(36, 0.3)
    assert timeline.num_late == 0


def test_a_block_that_started_late_is_late_even_if_it_arrives_in_time(timeline: Timeline, clock: Clock) -> None:
    clock.now_s = timeline.due_s(12)
    assert timeline.block_arrived(12, 0.3, start_late_s=0.5) == pytest.approx(0.5)
    assert timeline.num_late == 1
