"""The arithmetic of figures."""

import pytest

from avatar.types import BLOCK_S
from benchmarks.pipeline.figures import (
    FRAME_S,
    fairness,
    interval_std,
    longest_pause,
    lost_and_doubled,
    most_that_pass,
    on_time,
    rank,
    rate_hz,
    slope_per_hour,
    steady,
)
from benchmarks.row import row, table


def paced(count: int, *, late: dict[int, float] | None = None) -> list[tuple[int, int, float]]:
    """Blocks of twelve frames, each when its turn is, some later."""
    return [(12 * n, 12, 100 + n * BLOCK_S + (late or {}).get(n, 0.0)) for n in range(count)]


def test_a_rank_lies_between_the_values() -> None:
    assert rank([4.0, 1.0, 2.0, 3.0, 0.0], 50) == 2.0
    assert rank([float(n) for n in range(101)], 99) == 99.0
    assert rank([7.0], 99) == 7.0


def test_a_rate_counts_intervals_and_not_blocks() -> None:
    assert rate_hz([0.0, 0.5, 1.0]) == 2.0


def test_the_steady_part_has_no_start_and_no_end_of_any_session() -> None:
    early, late = [0.0, 1.0, 2.0, 3.0], [1.5, 2.5, 3.5, 4.5]
    assert steady([early, late], skip=1) == [[3.0], [2.5]]


def test_fairness_is_the_fastest_rate_by_the_slowest() -> None:
    assert fairness([[0.0, 1.0, 2.0], [0.0, 2.0, 4.0]]) == 2.0
    assert fairness([[0.0, 1.0], [0.5, 1.5]]) == 1.0


def test_frames_in_their_turn_are_on_time() -> None:
    assert on_time(paced(5)) == (60, 60)


def test_a_frame_may_come_while_the_one_before_is_shown() -> None:
    assert on_time(paced(5, late={2: 0.9 * FRAME_S})) == (60, 60)


def test_a_late_block_loses_the_frames_whose_turn_has_passed_and_delays_the_rest() -> None:
    late = dict.fromkeys(range(2, 5), 2.5 * FRAME_S)
    assert on_time(paced(5, late=late)) == (58, 60)


def test_frames_before_the_count_begins_do_not_count() -> None:
    late = {1: 2.5 * FRAME_S}
    assert on_time(paced(5, late=late), since=100 + 1.5 * BLOCK_S) == (36, 36)


def test_even_intervals_do_not_vary() -> None:
    assert interval_std([0.0, 1.0, 2.0]) == 0.0
    assert interval_std([0.0, 1.0, 4.0]) == 1.0


def test_the_longest_pause_may_begin_before_the_span_and_end_with_it() -> None:
    assert longest_pause([0.0, 1.0, 2.0, 3.0], since=0.5, until=2.5) == 1.0
    assert longest_pause([0.0, 4.0, 5.0], since=0.5, until=5.0) == 4.0
    assert longest_pause([0.0, 1.0], since=0.5, until=9.0) == 8.0


def test_lost_and_doubled_frames_are_told_by_their_numbers() -> None:
    assert lost_and_doubled([(3, 9), (12, 12), (24, 12)]) == (0, 0)
    assert lost_and_doubled([(3, 9), (24, 12)]) == (12, 0)
    assert lost_and_doubled([(3, 9), (12, 12), (12, 12)]) == (0, 12)


def test_a_slope_is_by_the_hour_of_media() -> None:
    assert slope_per_hour([0.0, 1800.0, 3600.0], [50.0, 51.0, 52.0]) == pytest.approx(2.0)


def test_what_is_taken_once_is_no_leak_and_what_is_taken_bit_by_bit_is() -> None:
    minutes = [60.0 * n for n in range(100)]
    assert slope_per_hour(minutes, [50.0 + 14.0 * (n > 40) for n in range(100)]) == 0
    assert slope_per_hour(minutes, [50.0 + 2.0 * (n // 10) for n in range(100)]) == pytest.approx(12, rel=0.1)


@pytest.mark.parametrize("most", range(11, 25))
def test_the_search_finds_the_last_number_that_passes(most: int) -> None:
    tried: dict[int, bool] = {}
    while (number := most_that_pass(tried, 11, 24)) is not None:
        tried[number] = number <= most
    assert max((number for number, passes in tried.items() if passes), default=11) == most
    assert len(tried) <= 4


def test_a_row_is_met_by_the_direction_of_its_target() -> None:
    assert row("f", 2.0, "ms", at_most=2.0).met is True
    assert row("f", 2.1, "ms", at_most=2.0).met is False
    assert row("f", 0.97, "", at_least=0.98).met is False
    assert row("f", 0.97, "").met is None


def test_ahead_says_how_many_times_better_we_are() -> None:
    assert row("f", 2.0, "ms", at_most=9.0, beside={"a": 4.0, "b": 1.0}).ahead == {"a": 2.0, "b": 0.5}
    assert row("f", 22.0, "", at_least=22.0, beside={"a": 1.0}).ahead == {"a": 22.0}


def test_the_table_shows_the_bound_the_target_and_the_peers_beside_each_value() -> None:
    lines = table([row("hop", 1.5, "ms", at_most=2.0, bound=0.5, beside={"gloo": 3.0}), row("plain", 1.0, "s")])
    assert [line.split() for line in lines.splitlines()] == [
        ["figure", "value", "bound", "target", "met", "gloo", "note"],
        ["hop", "1.5", "ms", "0.5", "<=", "2", "yes", "3", "(2x)"],
        ["plain", "1", "s"],
    ]
