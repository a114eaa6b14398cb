"""The product's placement over a simulated fleet: these fail when the policy gets worse."""

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.fleet.events import Clock, Process, Signal
from benchmarks.fleet.simulation import Fleet, Outcome, Simulation
from benchmarks.pipeline.metrics import percentile

SMALL = Fleet(num_sessions=200, num_gateways=8, num_pipelines=20, capacity=12, window_s=0.5)


def run(**changes: Any) -> Outcome:
    return Simulation(replace(SMALL, **changes)).run()


@pytest.mark.parametrize("seed", [1, 2])
def test_sessions_that_arrive_at_once_spread_over_all_workers(seed: int) -> None:
    outcome = run(seed=seed)
    assert sum(outcome.loads) == 6 * 200
    assert max(outcome.loads) <= 12
    assert min(outcome.loads) >= 8
    assert outcome.num_refusals == 0
    assert outcome.tries_per_stream < 2.1
    assert percentile(outcome.open_s, 99) < 0.4


def test_no_session_is_refused_while_there_is_room() -> None:
    outcome = run(capacity=10)
    assert set(outcome.loads) == {10}
    assert outcome.num_needless == 0


def test_sessions_that_do_not_fit_are_refused_and_keep_no_slot() -> None:
    outcome = run(capacity=9)
    assert set(outcome.loads) == {9}, "those that have a session have all of its streams"
    assert outcome.num_needless < 0.15 * outcome.num_refusals, "a slot may come back from a session that found no other"
    assert outcome.num_lost == 200 - 9 * 20
    assert outcome.num_refusals >= outcome.num_lost


def test_sessions_outlive_workers_and_gateways() -> None:
    outcome = run(num_lost_workers=4, num_lost_gateways=2)
    assert outcome.num_rebuilt > 0
    assert outcome.num_lost == 0
    assert sum(outcome.loads) == 6 * 200, "no stream stays open without its session"


def test_twelve_sessions_at_once_share_twelve_workers() -> None:
    fleets = [Fleet(12, num_gateways=4, num_pipelines=12, window_s=0.001, seed=seed) for seed in range(5)]
    assert max(max(Simulation(fleet).run().loads) for fleet in fleets) <= 2


def test_a_run_depends_on_its_seed_alone() -> None:
    first, again, other = (run(num_sessions=50, seed=seed) for seed in (3, 3, 4))
    assert first == again != other


def test_processes_wait_for_time_for_signals_and_for_each_other() -> None:
    clock, signal = Clock(), Signal()
    ended: list[Any] = []

    def wait(seconds: float) -> Process:
        yield seconds
        return seconds

    def parent() -> Process:
        yield signal
        return (yield [wait(0.2), wait(0.1)])

    clock.start(parent(), lambda result: ended.append((clock.now_s, result)))
    clock.at(1.0, signal.set)
    clock.run(2.0)
    assert ended == [(pytest.approx(1.2), [0.2, 0.1])]
    assert clock.now_s == 2.0
