"""Tests of avatar.failover.placement: the choice of workers by many processes, from old numbers."""

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from avatar.failover.placement import MAX_TRIES, MAX_UNKNOWN, Tries, WorkerLoad, choose, pause_s, retry_s, scarcest


@dataclass
class Worker:
    """A worker as one process sees it. active: its streams in truth."""

    load: WorkerLoad = field(default_factory=lambda: WorkerLoad(capacity=4, max_streams=4, is_registered=True))
    active: int = 0

    def accepts(self, bound: int | None) -> bool:
        if self.active >= self.load.capacity or (bound is not None and self.active > bound):
            return False
        self.active += 1
        return True


def opened(workers: list[Worker], rng: random.Random) -> Worker | None:
    """Open a stream at one of the workers, without a read of the registry."""
    tries = Tries(lambda: workers, rng, is_live=True)
    while chosen := tries.next():
        worker, bound = chosen
        if worker.accepts(bound):
            return worker
        worker.load.num_own -= 1
        tries.refused(worker, (worker.active, worker.load.capacity))
    return None


def test_own_streams_count_at_once_and_spread_evenly() -> None:
    workers, rng = [Worker() for _ in range(12)], random.Random(1)
    for _ in range(24):
        assert opened(workers, rng)
    assert {worker.active for worker in workers} == {2}


def test_equally_loaded_workers_are_chosen_at_random() -> None:
    workers, rng = [Worker() for _ in range(3)], random.Random(1)
    chosen = Counter(id(choose(workers, rng, is_live=True)) for _ in range(300))
    assert len(chosen) == 3
    assert min(chosen.values()) > 60


def test_streams_of_other_processes_are_found_by_the_bound() -> None:
    workers, rng = [Worker(), Worker()], random.Random(1)
    workers[0].active = workers[1].active = 2  # since the last report
    workers[0].load.report(1, 4)
    worker = opened(workers, rng)
    assert worker is not None
    assert workers[1].load.num_others == 2, "it was chosen first, refused, and told its real number"
    assert worker.load.num_own == 1


def test_a_full_worker_is_tried_last_and_one_that_gives_no_sign_before_it() -> None:
    full, doubtful, free = Worker(), Worker(), Worker()
    full.load.report(4, 4)
    doubtful.load.is_doubtful = True
    free.load.report(3, 4)
    tries = Tries(lambda: [full, doubtful, free], random.Random(1), is_live=True)
    order = []
    while chosen := tries.next():
        order.append(chosen[0])
        tries.failed(chosen[0])
    assert order == [free, doubtful, full]


def test_an_offline_stream_may_use_what_a_device_has_no_live_time_for() -> None:
    load = WorkerLoad(is_registered=True)
    load.report(2, 2, 8)
    assert not load.may_accept(is_live=True)
    assert load.may_accept(is_live=False)
    load.is_registered = False
    assert load.may_accept(is_live=True), "old numbers exclude no worker"


def test_an_opening_ends_after_five_tries_and_the_last_has_no_bound() -> None:
    workers = [Worker() for _ in range(9)]
    tries = Tries(lambda: workers, random.Random(1), is_live=True)
    bounds, news = [], []
    while True:
        news.append(tries.needs_news)
        if (chosen := tries.next()) is None:
            break
        worker, bound = chosen
        bounds.append(bound)
        worker.load.num_own -= 1
        tries.refused(worker, None)
    assert bounds == [MAX_UNKNOWN] * 4 + [None]
    assert len(bounds) == MAX_TRIES
    assert news == [False, False, True, True, True, False]


def test_a_worker_with_room_is_tried_again_after_its_refusal() -> None:
    worker = Worker(active=2)
    assert opened([worker], random.Random(1)) is worker
    assert (worker.load.num_own, worker.load.num_others) == (1, 2)
    assert opened([Worker(active=4)], random.Random(1)) is None


def test_a_sessions_streams_at_one_worker_may_arrive_in_any_order() -> None:
    worker = Worker(WorkerLoad(capacity=8, max_streams=8, num_levels=4, is_registered=True))
    openings = [Tries(lambda: [worker], random.Random(1), is_live=True).next() for _ in range(4)]
    for opening in reversed(openings):
        assert opening is not None
        assert worker.accepts(opening[1])
    assert worker.load.room(is_live=True) == 1


def test_the_scarcest_stage_is_the_first_of_those_with_the_fewest_free_slots() -> None:
    assert scarcest([3, 1, 2, 1]) == 1


@pytest.mark.parametrize(("draw", "least", "most"), [(pause_s, 0.02, 0.1), (retry_s, 1.0, 3.0)])
def test_refused_clients_come_back_apart(draw: object, least: float, most: float) -> None:
    assert callable(draw)
    times = {draw(random.Random(seed)) for seed in range(20)}
    assert len(times) == 20
    assert all(least <= each <= most for each in times)
