"""Placement: the worker of each new stream, chosen by many processes at once from numbers that may be old.

Pure code with an injected generator of random numbers: the gateway runs it over real workers, and the simulation of
`benchmarks/fleet` under a clock of its own.

The least loaded worker is chosen, one of several at random. A process counts its own streams as soon as it opens them.
Streams of other processes are bounded: a worker with over MAX_UNKNOWN more streams than the process believes refuses,
with its real numbers, and the process chooses again; after the second refusal it reads the registry first. So hundreds
of openings at once are spread nearly as if one process made them, each with fewer than two tries on average.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

# Refusals that end an opening, and those after which the registry is read again. The last try has no bound.
MAX_TRIES = 5
MAX_OLD_TRIES = 2
# Streams that a worker may have beyond those that this process believes it to have. 0 would spread streams best, at the
# cost of refusals: 2.7 instead of 1.7 tries per stream where 1,000 sessions come in a second (benchmarks/fleet).
MAX_UNKNOWN = 1
# Attempts to open a session's stages, of which a stage may have lost its free slot to another process in between.
MAX_ATTEMPTS = 3
PAUSE_S = 0.02, 0.1
# Clients that were refused together come back apart.
RETRY_S = 1.0, 3.0


@dataclass
class WorkerLoad:
    """The streams of one worker, as one process believes.

    num_own: streams of this process, also those that are being opened. num_others: all other streams, as of the last
    report. capacity: live streams that it accepts at a time. max_streams: streams of any kind. num_levels: streams of
    one session there.
    is_registered: the numbers come from the registry, and are therefore news. is_doubtful: the worker gives no sign of
    life, and has not been found to be lost yet.
    """

    num_own: int = 0
    num_others: int = 0
    capacity: int = 0
    max_streams: int = 0
    num_levels: int = 1
    is_registered: bool = False
    is_doubtful: bool = False

    @property
    def num_streams(self) -> int:
        """All streams."""
        return self.num_own + self.num_others

    def report(self, active: int, capacity: int, max_streams: int = 0) -> None:
        """Take over the worker's own numbers. max_streams: 0 leaves it as it is."""
        self.num_others = max(0, active - self.num_own)
        self.capacity, self.max_streams = capacity, max_streams or self.max_streams or capacity

    def num_free(self, *, is_live: bool) -> int:
        """Return the number of further streams of a kind; 0 or below if the worker is full."""
        return (self.capacity if is_live else self.max_streams) - self.num_streams

    def room(self, *, is_live: bool) -> float:
        """Return the free slots in sessions. Numbers that are no news leave at least one stream."""
        return max(self.num_free(is_live=is_live), not self.is_registered, 0) / self.num_levels

    def may_accept(self, *, is_live: bool) -> bool:
        """Return False if the worker is known to be full. Numbers that are no news exclude no worker."""
        return self.room(is_live=is_live) > 0

    def rank(self, *, is_live: bool) -> tuple[int, float, int]:
        """Return the order in which workers are chosen: free before doubtful before full, least loaded first."""
        group = 2 if self.num_free(is_live=is_live) <= 0 else int(self.is_doubtful)
        return group, self.num_streams / max(1, self.capacity), self.num_streams


class Loaded(Protocol):
    """A worker with a load."""

    load: WorkerLoad


LoadedWorker = TypeVar("LoadedWorker", bound=Loaded)


def choose(workers: Iterable[LoadedWorker], rng: random.Random, *, is_live: bool) -> LoadedWorker:
    """Return a worker of the lowest rank, one of several at random."""
    best: list[LoadedWorker] = []
    lowest: tuple[int, float, int] | None = None
    for worker in workers:
        rank = worker.load.rank(is_live=is_live)
        if lowest is None or rank < lowest:
            lowest, best = rank, []
        if rank == lowest:
            best.append(worker)
    return rng.choice(best)


class Tries(Generic[LoadedWorker]):
    """The tries of one opening: take `next`, and report a worker that does not accept the stream.

    needs_news: read the registry before the next try.
    """

    def __init__(
        self,
        candidates: Callable[[], Iterable[LoadedWorker]],
        rng: random.Random,
        *,
        is_live: bool,
        first: LoadedWorker | None = None,
    ) -> None:
        """candidates: returns the workers that serve the stream, at the time of each try. first: one of them to try
        before all others, without a bound: it has a slot of the session.
        """
        self._candidates, self._rng, self._is_live = candidates, rng, is_live
        self._first = first
        self._excluded: list[LoadedWorker] = []
        self._num_refusals = 0

    @property
    def needs_news(self) -> bool:
        return MAX_OLD_TRIES <= self._num_refusals < MAX_TRIES

    def next(self) -> tuple[LoadedWorker, int | None] | None:
        """Return a worker, and the bound on its streams; None if there is none, or after MAX_TRIES refusals.

        The stream counts as the process's own: the caller takes it off `num_own` if it does not open, or has ended.
        """
        if self._num_refusals == MAX_TRIES:
            return None
        first, self._first = self._first, None
        remaining = [each for each in self._candidates() if not any(each is other for other in self._excluded)]
        if not remaining:
            return None
        if first in remaining:
            worker, bound = first, None
        else:
            worker = choose(remaining, self._rng, is_live=self._is_live)
            # The session's other streams at the worker may arrive before this one.
            believed = worker.load.num_streams + worker.load.num_levels - 1
            bound = None if self._num_refusals == MAX_TRIES - 1 else believed + MAX_UNKNOWN
        worker.load.num_own += 1
        return worker, bound

    def refused(self, worker: LoadedWorker, numbers: tuple[int, int] | None) -> None:
        """Take over the numbers of a worker that refused: its active streams and capacity, if it gave them.

        Only a worker that has room is tried again.
        """
        self._num_refusals += 1
        if numbers:
            active, capacity = numbers
            worker.load.report(active, capacity)
        if not numbers or worker.load.num_free(is_live=self._is_live) <= 0:
            self.failed(worker)

    def failed(self, worker: LoadedWorker) -> None:
        """Try this worker no more. A lost worker alone is no refusal: the next one may have room."""
        self._excluded.append(worker)


def scarcest(free: Sequence[float]) -> int:
    """Return the index of the stage with the fewest free slots, the first of several.

    Every process opens this stage first and alone: who gets no slot there keeps none from others elsewhere.
    """
    return min(range(len(free)), key=free.__getitem__)


def pause_s(rng: random.Random) -> float:
    """Return the seconds before another attempt at a session's stages."""
    return rng.uniform(*PAUSE_S)


def retry_s(rng: random.Random) -> float:
    """Return the seconds after which a client that was refused comes again."""
    return rng.uniform(*RETRY_S)
