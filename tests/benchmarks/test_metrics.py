"""Tests of benchmarks.pipeline.metrics and benchmarks.row."""

from collections.abc import Callable

import pytest

from benchmarks.pipeline.client import Arrival, SessionReport
from benchmarks.pipeline.crash import is_watched
from benchmarks.pipeline.endurance import growth
from benchmarks.pipeline.live import share_on_time
from benchmarks.pipeline.metrics import (
    FRAME_S,
    TooSlowError,
    fairness,
    interval_std,
    longest_pause,
    lost_and_duplicated,
    next_to_try,
    on_time,
    percentile,
    rate_hz,
    slope_per_hour,
    steady,
)
from benchmarks.row import row, table

BLOCK_S = 0.48


def paced(count: int, *, late: dict[int, float] | None = None) -> list[tuple[int, int, float]]:
    """Blocks of twelve frames, each on time, some late."""
    return [(12 * n, 12, 100 + n * BLOCK_S + (late or {}).get(n, 0.0)) for n in range(count)]


def test_a_percentile_lies_between_the_values() -> None:
    assert percentile([4.0, 1.0, 2.0, 3.0, 0.0], 50) == 2.0
    assert percentile([float(n) for n in range(101)], 99) == 99.0
    assert percentile([7.0], 99) == 7.0


def test_a_rate_counts_intervals_and_not_blocks() -> None:
    assert rate_hz([0.0, 0.5, 1.0]) == 2.0


def test_the_steady_part_excludes_every_sessions_start_and_end() -> None:
    early, late = [0.0, 1.0, 2.0, 3.0], [1.5, 2.5, 3.5, 4.5]
    assert steady([early, late], skip=1) == [[3.0], [2.5]]


def test_fairness_is_the_fastest_rate_divided_by_the_slowest() -> None:
    assert fairness([[0.0, 1.0, 2.0], [0.0, 2.0, 4.0]]) == 2.0
    assert fairness([[0.0, 1.0], [0.5, 1.5]]) == 1.0


def test_paced_frames_are_on_time() -> None:
    assert on_time(paced(5)) == (60, 60)


def test_a_frame_may_arrive_while_the_previous_one_is_shown() -> None:
    assert on_time(paced(5, late={2: 0.9 * FRAME_S})) == (60, 60)


def test_a_late_block_makes_overdue_frames_late_and_delays_the_rest() -> None:
    late = dict.fromkeys(range(2, 5), 2.5 * FRAME_S)
    assert on_time(paced(5, late=late)) == (58, 60)


def test_frames_before_the_start_are_not_counted() -> None:
    late = {1: 2.5 * FRAME_S}
    assert on_time(paced(5, late=late), since=100 + 1.5 * BLOCK_S) == (36, 36)


def test_even_intervals_do_not_vary() -> None:
    assert interval_std([0.0, 1.0, 2.0]) == 0.0
    assert interval_std([0.0, 1.0, 4.0]) == 1.0


def test_the_longest_pause_may_start_before_the_span_and_end_with_it() -> None:
    assert longest_pause([0.0, 1.0, 2.0, 3.0], since=0.5, until=2.5) == 1.0
    assert longest_pause([0.0, 4.0, 5.0], since=0.5, until=5.0) == 4.0
    assert longest_pause([0.0, 1.0], since=0.5, until=9.0) == 8.0


def test_numbers_reveal_lost_and_duplicated_frames() -> None:
    assert lost_and_duplicated([(3, 9), (12, 12), (24, 12)]) == (0, 0)
    assert lost_and_duplicated([(3, 9), (24, 12)]) == (12, 0)
    assert lost_and_duplicated([(3, 9), (12, 12), (12, 12)]) == (0, 12)


def test_a_slope_is_per_hour_of_media() -> None:
    assert slope_per_hour([0.0, 1800.0, 3600.0], [50.0, 51.0, 52.0]) == pytest.approx(2.0)


def test_a_single_allocation_is_no_leak_and_steady_growth_is() -> None:
    minutes = [60.0 * n for n in range(100)]
    assert slope_per_hour(minutes, [50.0 + 14.0 * (n > 40) for n in range(100)]) == 0
    assert slope_per_hour(minutes, [50.0 + 2.0 * (n // 10) for n in range(100)]) == pytest.approx(12, rel=0.1)


@pytest.mark.parametrize("most", range(11, 25))
def test_the_search_finds_the_last_number_that_passes(most: int) -> None:
    tried: dict[int, bool] = {}
    while (number := next_to_try(tried, 11, 24)) is not None:
        tried[number] = number <= most
    assert max((number for number, passes in tried.items() if passes), default=11) == most
    assert len(tried) <= 4


def test_a_row_is_met_in_the_direction_of_its_target() -> None:
    assert row("f", 2.0, "ms", at_most=2.0).met is True
    assert row("f", 2.1, "ms", at_most=2.0).met is False
    assert row("f", 0.97, "", at_least=0.98).met is False
    assert row("f", 0.97, "").met is None


def test_ahead_is_the_factor_over_each_peer() -> None:
    assert row("f", 2.0, "ms", at_most=9.0, beside={"a": 4.0, "b": 1.0}).ahead == {"a": 2.0, "b": 0.5}
    assert row("f", 22.0, "", at_least=22.0, beside={"a": 1.0}).ahead == {"a": 22.0}


def test_the_table_shows_bound_target_and_peers_of_each_value() -> None:
    lines = table([row("hop", 1.5, "ms", at_most=2.0, bound=0.5, beside={"gloo": 3.0}), row("plain", 1.0, "s")])
    assert [line.split() for line in lines.splitlines()] == [
        ["figure", "value", "bound", "target", "met", "gloo", "note"],
        ["hop", "1.5", "ms", "0.5", "<=", "2", "yes", "3", "(2x)"],
        ["plain", "1", "s"],
    ]


@pytest.mark.parametrize(
    "measure",
    [
        lambda: percentile([], 95),
        lambda: steady([[0.0, 1.0], [0.0]], skip=1),
        lambda: steady([], skip=1),
        lambda: rate_hz([]),
        lambda: rate_hz([1.0]),
        lambda: fairness([[0.0, 1.0], [0.5]]),
        lambda: interval_std([1.0]),
        lambda: slope_per_hour([], []),
        lambda: slope_per_hour([5.0, 5.0], [50.0, 51.0]),
        lambda: growth([], [(1.0, {"gateway": 50.0})]),
        lambda: growth([SessionReport(arrivals=[Arrival(3, 9, 1.0, False)])], [(2.0, {"gateway": 50.0})]),
    ],
)
def test_a_machine_that_is_too_slow_is_named_as_such(measure: Callable[[], object]) -> None:
    with pytest.raises(TooSlowError, match="too slow to measure"):
        measure()


def test_sessions_without_frames_are_not_on_time() -> None:
    assert share_on_time([]) == 0.0
    assert on_time([]) == (0, 0)
    assert share_on_time([SessionReport(arrivals=[Arrival(3, 9, 1.0, False)])]) == 0.0
    assert not is_watched(SessionReport(), at=0.0)
