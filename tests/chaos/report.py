"""The report of a random run: injected faults, their consequences, and violations of the bounds."""

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import psutil

from tests.chaos.faults import Fault
from tests.chaos.speaker import Received, Speaker, distance
from tests.chaos.suite import ChaosSuite

# Bounds that hold on a busy machine; not promises.
RECOVERY_S = 20.0
# Between two frames of a live session during an attack. A block's frames come together: 0.48 s are the least.
PAUSE_S = 5.0
GROWN_BYTES = 256 << 20
# Frames that a gateway sent and its client did not read are not made again; frames that it did not record are.
MAX_UNREAD_FRAMES = 48


@dataclass
class Incident:
    """An injected fault, its start and end on the monotonic clock, and the seconds until each session continued.

    pauses_s: the longest time between two frames of each live session.
    """

    fault: Fault
    started_s: float
    ended_s: float = float("inf")
    recoveries_s: list[float] = field(default_factory=list)
    pauses_s: list[float] = field(default_factory=list)


@dataclass
class Report:
    """The results so far.

    counts: of sessions, frames and so on. distances: after a level was rebuilt, from the frames of an undisturbed run.
    grown_bytes: the largest growth of any process's memory.
    """

    incidents: list[Incident] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    distances: list[float] = field(default_factory=list)
    grown_bytes: int = 0
    _first_bytes: dict[int, int] = field(default_factory=dict)

    def since(self, started_s: float) -> list[Incident]:
        """Return the incidents that had not ended at that time."""
        return [each for each in self.incidents if started_s < each.ended_s]

    def add_violation(self, message: str, incidents: Sequence[Incident]) -> None:
        """Record a violation, with the incidents that may have caused it."""
        self.violations.append(f"{message}; faults: {', '.join(str(each.fault) for each in incidents) or 'none'}")

    def add_session(self, speaker: Speaker, started_s: float, expected: list[bytes] | None) -> None:
        """Record a finished session. expected: its frames without faults, None for a live session."""
        incidents, jumps = self.since(started_s), speaker.jumps
        kind = "a live session" if expected is None else "a session"
        self.counts.update(frames=len(speaker.received), lost=speaker.num_lost, repeated=speaker.num_repeated)
        self.counts.update(sessions=1, disturbed=bool(jumps), jumps=len(jumps))
        if speaker.num_lost or speaker.num_repeated:
            self.add_violation(f"{kind} lost {speaker.num_lost} frames, {speaker.num_repeated} came twice", incidents)
        if len(jumps) > sum(not each.fault.is_attack for each in incidents):
            self.add_violation(f"{kind} jumped {len(jumps)} times", incidents)
        for frame in jumps:
            self._add_recovery(frame)
        if expected is None:
            self._add_pauses(speaker, incidents)
        else:
            self._compare(speaker, incidents, expected)

    def measure_memory(self, suite: ChaosSuite) -> None:
        """Record the growth of all processes."""
        for name, each in suite.suite.processes.items():
            size = psutil.Process(each.pid).memory_info().rss
            grown = size - self._first_bytes.setdefault(each.pid, size)
            self.grown_bytes = max(self.grown_bytes, grown)
            if grown > GROWN_BYTES:
                self.violations.append(f"{name} has grown by {grown / 1e6:.0f} MB")

    def table(self) -> Iterator[str]:
        """Yield the lines of a table."""
        yield f"{'fault':20}{'times':>6}{'sessions':>10}{'p50':>9}{'p95':>9}{'max':>9}{'pause':>9}"
        for fault in sorted({str(each.fault) for each in self.incidents}):
            yield _row(fault, [each for each in self.incidents if str(each.fault) == fault])
        yield _row("all", self.incidents)
        yield ""
        yield ", ".join(f"{name} {count}" for name, count in self.counts.items())
        if self.distances:
            worst = max(self.distances)
            yield f"relative RMS after a lost level: median {statistics.median(self.distances):.2g}, worst {worst:.2g}"
        yield f"largest growth of a process {self.grown_bytes / 1e6:.0f} MB"
        yield from (f"VIOLATION {each}" for each in self.violations)

    def _add_recovery(self, frame: Received) -> None:
        before = [each for each in self.incidents if each.started_s < frame.time_s]
        if not before:
            self.add_violation("a session jumped", [])
            return
        recovery_s = frame.time_s - before[-1].started_s
        before[-1].recoveries_s.append(recovery_s)
        if recovery_s > RECOVERY_S:
            self.add_violation(f"a session continued after {recovery_s:.1f} s", before[-1:])

    def _add_pauses(self, speaker: Speaker, incidents: Sequence[Incident]) -> None:
        for each in incidents:
            pause_s = speaker.longest_pause_s(each.started_s, each.ended_s)
            each.pauses_s.append(pause_s)
            if pause_s > PAUSE_S and all(other.fault.is_attack for other in incidents):
                self.add_violation(f"a live session had no frame for {pause_s:.1f} s", [each])

    def _compare(self, speaker: Speaker, incidents: Sequence[Incident], expected: list[bytes]) -> None:
        pixels = speaker.pixels
        if speaker.jumps and any(each.fault.service == "gateway" for each in incidents):
            if abs(len(pixels) - len(expected)) > MAX_UNREAD_FRAMES:
                self.add_violation(f"a session had {len(pixels)} frames, about {len(expected)} expected", incidents)
        elif len(pixels) != len(expected):
            self.add_violation(f"a session had {len(pixels)} frames, {len(expected)} expected", incidents)
        elif speaker.jumps and not all(each.fault.is_exact for each in incidents):
            first = speaker.jumps[0].index - speaker.received[0].index
            self.distances.append(distance(pixels[first:], expected[first:]))
        else:
            self.counts["compared"] += 1
            if pixels != expected:
                self.add_violation("a session's frames differ from those of an undisturbed one", incidents)


def _row(name: str, incidents: Sequence[Incident]) -> str:
    recoveries = sorted(seconds for each in incidents for seconds in each.recoveries_s)
    indexes = [round(share * (len(recoveries) - 1)) for share in (0.5, 0.95, 1.0)] if recoveries else []
    times = [f"{recoveries[index]:7.2f} s" for index in indexes] or ["-".rjust(9)] * 3
    pauses = [seconds for each in incidents for seconds in each.pauses_s]
    pause = f"{max(pauses):7.2f} s" if pauses else "-".rjust(9)
    return f"{name:20}{len(incidents):>6}{len(recoveries):>10}{''.join(times)}{pause}"
