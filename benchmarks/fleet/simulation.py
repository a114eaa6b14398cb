"""A simulated fleet: gateways that place arriving sessions on pipelines, by the product's own policy.

The policy's code (`avatar.failover.placement`) runs under a simulated clock, with the delays of the real registry: a
worker writes its state after a change and at every heartbeat, a gateway reads all states twice a second and when it
asks. Openings take time, workers and gateways fail, and refused clients come again. Runs are deterministic by seed.
"""

import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from avatar.failover import discovery
from avatar.failover.placement import MAX_ATTEMPTS, Tries, WorkerLoad, pause_s, retry_s, scarcest
from avatar.failover.pool import DOUBT_S
from avatar.store.registry import STALE_S
from benchmarks.fleet.content import STAGES
from benchmarks.fleet.events import Clock, Process, Signal
from benchmarks.pipeline.metrics import percentile
from benchmarks.row import Row, row
from services import registration

# Assumed: a call to Redis; one way to a worker, of which one in SLOW_EVERY is slow; a client's way to another gateway.
REDIS_S = 0.002
WAY_S, SLOW_WAY_S, SLOW_EVERY = (0.001, 0.004), (0.02, 0.08), 50
RECONNECT_S = (0.1, 0.5)
REBUILD_S, REBUILD_PAUSE_S = 10.0, 0.05
# After the last arrival; refused clients have then come again several times.
AFTER_S = 12.0
# To open a session; also one whose gateway fails, from then on.
TARGET_S = 1.0


@dataclass(frozen=True)
class Fleet:
    """A fleet and its arrivals.

    capacity: sessions of a worker. window_s: in which all sessions arrive, evenly at random. num_lost_workers,
    num_lost_gateways: that fail in the same time, and stay away.
    """

    num_sessions: int = 1000
    num_gateways: int = 20
    num_pipelines: int = 100
    capacity: int = 12
    window_s: float = 1.0
    num_lost_workers: int = 0
    num_lost_gateways: int = 0
    seed: int = 1


@dataclass
class Outcome:
    """The result of a run.

    num_tries: of streams, in all. num_streams: opened. num_refusals: of sessions, each time that a client was refused;
    num_needless: of these, those when every stage had a free slot. open_s: seconds from each arrival to the open
    session.
    num_rebuilt: streams that moved from a lost worker. num_lost: sessions that no gateway has at the end.
    loads: sessions of each living worker at the end.
    """

    num_tries: int = 0
    num_streams: int = 0
    num_refusals: int = 0
    num_needless: int = 0
    num_rebuilt: int = 0
    num_lost: int = 0
    open_s: list[float] = field(default_factory=list)
    loads: list[int] = field(default_factory=list)

    @property
    def tries_per_stream(self) -> float:
        return self.num_tries / self.num_streams


@dataclass(eq=False)
class Worker:
    """A worker in truth, and what the registry has of it."""

    stage: str
    capacity: int
    active: int = 0
    registered: int = 0
    is_alive: bool = True
    is_written: bool = True  # there is no change to be written
    is_registered: bool = True

    @property
    def has_room(self) -> bool:
        return self.is_alive and self.active < self.capacity


@dataclass(eq=False)
class View:
    """A worker as one gateway sees it."""

    worker: Worker
    load: WorkerLoad
    is_lost: bool = False


@dataclass(eq=False)
class Session:
    """A client's session. arrived_s: when it last came without a stream. streams: by stage, once it is open."""

    arrived_s: float
    gateway: "Gateway | None" = None
    streams: dict[str, View] = field(default_factory=dict)


class Gateway:
    """A gateway: its views of all workers, and its reads of the registry."""

    def __init__(self, clock: Clock, workers: list[Worker], rng: random.Random) -> None:
        self.is_alive = True
        self.views: dict[str, list[View]] = {stage: [] for stage in STAGES}
        for worker in workers:
            load = WorkerLoad(capacity=worker.capacity, max_streams=worker.capacity, is_registered=True)
            self.views[worker.stage].append(View(worker, load))
        self._clock = clock
        self._wanted: Signal | None = None
        self._read_s = 0.0
        clock.start(self._read_forever(rng.uniform(0, discovery.READ_EVERY_S)))

    def alive(self, stage: str) -> list[View]:
        """Return the workers of a stage that it has not found to be lost."""
        return [view for view in self.views[stage] if not view.is_lost]

    def room(self, stage: str) -> float:
        return sum(view.load.room(is_live=True) for view in self.alive(stage))

    def refresh(self, *, settled: bool = False) -> Process:
        """Wait for a read as `Discovery.refresh` does."""
        if settled:
            yield discovery.SETTLE_S
        elif self._clock.now_s - self._read_s < discovery.FRESH_S:
            return
        if self._wanted is None:
            self._wanted = Signal()
            self._clock.start(self._read_wanted(self._wanted))
        yield self._wanted

    def _read_wanted(self, wanted: Signal) -> Process:
        self._wanted = None
        yield from self._read()
        wanted.set()

    def _read_forever(self, phase_s: float) -> Process:
        yield phase_s
        while self.is_alive:
            yield from self._read()
            yield discovery.READ_EVERY_S

    def _read(self) -> Process:
        self._read_s = self._clock.now_s
        yield REDIS_S / 2
        read = [(view, view.worker.registered) for views in self.views.values() for view in views]
        gone = {view for view, _ in read if not view.worker.is_registered}
        yield REDIS_S / 2
        for view, active in read:
            if view in gone:
                self._doubt(view)
            elif not view.is_lost:
                view.load.report(active, view.worker.capacity)

    def _doubt(self, view: View) -> None:
        """Ask a worker that the registry no longer has: it does not answer."""
        if not view.load.is_doubtful:
            view.load.is_registered, view.load.is_doubtful = False, True
            self._clock.at(self._clock.now_s + DOUBT_S, lambda: setattr(view, "is_lost", True))


class Simulation:
    """One run of a fleet: `run` returns its outcome."""

    def __init__(self, fleet: Fleet) -> None:
        self.outcome = Outcome()
        self._fleet, self._rng, self._clock = fleet, random.Random(fleet.seed), Clock()
        self._workers = [Worker(stage, fleet.capacity) for stage in STAGES for _ in range(fleet.num_pipelines)]
        self._gateways = [Gateway(self._clock, self._workers, self._rng) for _ in range(fleet.num_gateways)]
        self._sessions: list[Session] = []

    def run(self) -> Outcome:
        fleet, rng, clock = self._fleet, self._rng, self._clock
        for _ in range(fleet.num_sessions):
            clock.at(rng.uniform(0, fleet.window_s), self._arrive)
        for worker in rng.sample(self._workers, fleet.num_lost_workers):
            clock.at(rng.uniform(0, fleet.window_s), lambda worker=worker: self._lose_worker(worker))  # type: ignore[misc]
        for gateway in rng.sample(self._gateways, fleet.num_lost_gateways):
            clock.at(rng.uniform(0, fleet.window_s), lambda lost=gateway: self._lose_gateway(lost))  # type: ignore[misc]
        clock.run(fleet.window_s + AFTER_S)
        self.outcome.num_lost = sum(not session.streams for session in self._sessions)
        self.outcome.loads = [worker.active for worker in self._workers if worker.is_alive]
        return self.outcome

    def _arrive(self) -> None:
        session = Session(self._clock.now_s)
        self._sessions.append(session)
        self._clock.start(self._open(session))

    def _open(self, session: Session) -> Process:
        """Open a session at a random gateway, as its client does: after a refusal it comes again."""
        while True:
            gateway = self._rng.choice([each for each in self._gateways if each.is_alive])
            streams = yield from self._open_stages(gateway)
            if streams and gateway.is_alive:
                break
            if gateway.is_alive:
                self.outcome.num_refusals += 1
                self.outcome.num_needless += self._has_room()
                yield retry_s(self._rng)
            else:
                self._release(streams)
                yield self._rng.uniform(*RECONNECT_S)
        session.gateway, session.streams = gateway, streams
        self.outcome.open_s.append(self._clock.now_s - session.arrived_s)
        for stage, view in streams.items():
            if not view.worker.is_alive:
                self._clock.start(self._rebuild(session, stage))

    def _has_room(self) -> bool:
        free = Counter(worker.stage for worker in self._workers if worker.has_room)
        return all(free[stage] for stage in STAGES)

    def _open_stages(self, gateway: Gateway) -> Process:
        """Open streams at all stages or none, as services/gateway/stages.py does; the scarcest stage comes first."""
        for attempts_left in reversed(range(MAX_ATTEMPTS)):
            if not all(map(gateway.room, STAGES)):
                yield from gateway.refresh()
            room = [gateway.room(stage) for stage in STAGES]
            if not all(room):
                return {}
            first = STAGES[scarcest(room)]
            others = [stage for stage in STAGES if stage != first]
            streams = {first: (yield from self._open_stream(gateway, first))}
            if streams[first]:
                opened = yield [self._open_stream(gateway, stage) for stage in others]
                streams |= dict(zip(others, opened, strict=True))
                if all(streams.values()):
                    return streams
            self._release(streams)
            if attempts_left:
                yield pause_s(self._rng)
        return {}

    def _open_stream(self, gateway: Gateway, stage: str) -> Process:
        """Open a stream at a worker of a stage, as WorkerPool.open does; return its view, None if none takes it."""
        tries = Tries(lambda: gateway.alive(stage), self._rng, is_live=True)
        while True:
            if tries.needs_news:
                yield from gateway.refresh(settled=True)
            if (chosen := tries.next()) is None:
                return None
            view, bound = chosen
            self.outcome.num_tries += 1
            yield self._way_s()
            is_alive, is_open = view.worker.is_alive, self._accept(view.worker, bound)
            numbers = (view.worker.active, view.worker.capacity)
            yield self._way_s()
            if is_open:
                self.outcome.num_streams += 1
                return view
            view.load.num_own -= 1
            if is_alive:
                tries.refused(view, numbers)
            else:
                view.is_lost = True
                tries.failed(view)

    def _way_s(self) -> float:
        return self._rng.uniform(*(WAY_S if self._rng.randrange(SLOW_EVERY) else SLOW_WAY_S))

    def _accept(self, worker: Worker, bound: int | None) -> bool:
        if not worker.has_room or (bound is not None and worker.active > bound):
            return False
        self._change(worker, 1)
        return True

    def _change(self, worker: Worker, difference: int) -> None:
        """Change a worker's streams; the change is written soon, with those that follow it."""
        worker.active += difference
        if worker.is_written:
            worker.is_written = False
            self._clock.start(self._write(worker))

    def _write(self, worker: Worker) -> Process:
        yield registration.SETTLE_S
        worker.is_written = True
        active = worker.active
        yield REDIS_S / 2
        worker.registered = active

    def _release(self, streams: Mapping[str, View | None]) -> None:
        for view in filter(None, streams.values()):
            view.load.num_own -= 1
            self._clock.start(self._end_stream(view.worker))

    def _end_stream(self, worker: Worker) -> Process:
        yield self._way_s()
        self._change(worker, -1)

    def _lose_worker(self, worker: Worker) -> None:
        worker.is_alive = False
        gone_s = self._clock.now_s + STALE_S - self._rng.uniform(0, registration.HEARTBEAT_S)
        self._clock.at(gone_s, lambda: setattr(worker, "is_registered", False))
        for session in self._sessions:
            for stage, view in session.streams.items():
                if view.worker is worker:
                    self._clock.start(self._rebuild(session, stage))

    def _rebuild(self, session: Session, stage: str) -> Process:
        """Open a stream again at another worker. The session is lost if none takes it in time."""
        gateway, lost_s = session.gateway, self._clock.now_s
        assert gateway is not None
        session.streams[stage].is_lost = True
        session.streams[stage].load.num_own -= 1
        while self._clock.now_s - lost_s < REBUILD_S:
            view = yield from self._open_stream(gateway, stage)
            if session.gateway is not gateway:  # it was lost meanwhile
                self._release({stage: view})
                return
            if view:
                session.streams[stage] = view
                self.outcome.num_rebuilt += 1
                return
            yield REBUILD_PAUSE_S
        self._release(session.streams)
        session.streams = {}

    def _lose_gateway(self, gateway: Gateway) -> None:
        """End a gateway, and with it its streams; its clients resume their sessions at others."""
        gateway.is_alive = False
        for session in self._sessions:
            if session.gateway is gateway:
                self._release(session.streams)
                session.gateway, session.streams, session.arrived_s = None, {}, self._clock.now_s
                self._clock.start(self._resume(session))

    def _resume(self, session: Session) -> Process:
        yield self._rng.uniform(*RECONNECT_S)
        yield from self._open(session)


def rows() -> list[Row]:
    """Simulate arrivals of 1,000 sessions at 20 gateways and 100 pipelines, in 1 s and in 10 s."""
    fleets = {
        "1,000 sessions in 10 s": Fleet(window_s=10.0),
        "1,000 sessions in 1 s": Fleet(),
        "1,000 sessions in 1 s for 1,000 slots": Fleet(capacity=10),
        "1,000 sessions in 10 s, with failures": Fleet(window_s=10.0, num_lost_workers=12, num_lost_gateways=2),
        "1,000 sessions in 1 s, with failures": Fleet(num_lost_workers=12, num_lost_gateways=2),
    }
    return [each for name, fleet in fleets.items() for each in _rows(name, fleet)]


def _rows(name: str, fleet: Fleet) -> Iterable[Row]:
    outcome, name = Simulation(fleet).run(), f"fleet: {name}: "
    fewest, most = min(outcome.loads), max(outcome.loads)
    ideal = -(-fleet.num_sessions // fleet.num_pipelines)
    refusals = f"of {outcome.num_refusals}; {outcome.num_lost} sessions lost, {outcome.num_rebuilt} streams rebuilt"
    p50_ms, p99_ms = (percentile(outcome.open_s, percent) * 1e3 for percent in (50, 99))
    opening = f"p50 {p50_ms:.3g}; {outcome.tries_per_stream:.3g} tries per stream"
    best_ms = 4e3 * WAY_S[0]  # to the scarcest stage and back, then to the others and back
    yield row(f"{name}busiest worker", most, "sessions", at_most=ideal + 2, bound=ideal, note=f"{fewest} to {most}")
    yield row(f"{name}refusals with room", outcome.num_needless, "", at_most=0, bound=0, note=refusals)
    yield row(f"{name}time to open, p99", p99_ms, "ms", at_most=TARGET_S * 1e3, bound=best_ms, note=opening)
