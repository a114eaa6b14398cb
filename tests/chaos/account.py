"""The account of a random run: its faults, their cost, and whether the cost was too high."""

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import psutil

from tests.chaos.faults import Fault
from tests.chaos.speaker import Seen, Speaker, distance
from tests.chaos.suite import Spared

# No promises, but bounds that a busy machine keeps.
RECOVERY_S = 20.0
GROWN_BYTES = 256 << 20
# What a gateway had sent and its client had not read is not made again; what it had not noted is.
MAX_UNREAD_FRAMES = 48


@dataclass
class Struck:
    """A fault that happened, from when to when on the monotonic clock, and the seconds until each session went on."""

    fault: Fault
    began_s: float
    ended_s: float = float("inf")
    recoveries_s: list[float] = field(default_factory=list)


@dataclass
class Account:
    """The account so far.

    counts: of sessions, frames and so on. distances: of frames after a level was rebuilt to those of an undisturbed
    run. grown_bytes: by which the memory of any process has grown.
    """

    struck: list[Struck] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    distances: list[float] = field(default_factory=list)
    grown_bytes: int = 0
    _first_bytes: dict[int, int] = field(default_factory=dict)

    def since(self, began_s: float) -> list[Struck]:
        """Return the faults that were active at any time since then."""
        return [each for each in self.struck if began_s < each.ended_s]

    def blame(self, what: str, struck: Sequence[Struck]) -> None:
        """Something was not as it has to be."""
        self.violations.append(f"{what}; broken: {', '.join(str(each.fault) for each in struck) or 'nothing'}")

    def ended(self, speaker: Speaker, began_s: float, expected: list[bytes] | None) -> None:
        """A session has ended. expected: its frames where nothing breaks, None for one that is live."""
        struck, jumps = self.since(began_s), speaker.jumps
        kind = "a live session" if expected is None else "a session"
        self.counts.update(frames=len(speaker.seen), lost=speaker.num_lost, doubled=speaker.num_doubled)
        self.counts.update(sessions=1, touched=bool(jumps), jumps=len(jumps))
        if speaker.num_lost or speaker.num_doubled:
            self.blame(f"{kind} lost {speaker.num_lost} frames, {speaker.num_doubled} came twice", struck)
        if len(jumps) > len(struck):
            self.blame(f"{kind} jumped {len(jumps)} times", struck)
        for frame in jumps:
            self._recovered(frame)
        if expected is not None:
            self._compare(speaker, struck, expected)

    def remember(self, suite: Spared) -> None:
        """Note the memory of all processes."""
        for name, each in suite.suite.processes.items():
            size = psutil.Process(each.pid).memory_info().rss
            grown = size - self._first_bytes.setdefault(each.pid, size)
            self.grown_bytes = max(self.grown_bytes, grown)
            if grown > GROWN_BYTES:
                self.violations.append(f"{name} has grown by {grown / 1e6:.0f} MB")

    def table(self) -> Iterator[str]:
        """All of it in lines."""
        yield f"{'fault':20}{'times':>6}{'sessions':>10}{'p50':>9}{'p95':>9}{'max':>9}"
        for fault in sorted({str(each.fault) for each in self.struck}):
            alike = [each for each in self.struck if str(each.fault) == fault]
            yield _row(fault, alike)
        yield _row("all", self.struck)
        yield ""
        yield ", ".join(f"{name} {count}" for name, count in self.counts.items())
        if self.distances:
            worst = max(self.distances)
            yield f"relative RMS behind a lost level: median {statistics.median(self.distances):.2g}, worst {worst:.2g}"
        yield f"largest growth of a process {self.grown_bytes / 1e6:.0f} MB"
        yield from (f"VIOLATION {each}" for each in self.violations)

    def _recovered(self, frame: Seen) -> None:
        before = [each for each in self.struck if each.began_s < frame.came_s]
        if not before:
            self.blame("a session jumped", [])
            return
        took_s = frame.came_s - before[-1].began_s
        before[-1].recoveries_s.append(took_s)
        if took_s > RECOVERY_S:
            self.blame(f"a session went on after {took_s:.1f} s", before[-1:])

    def _compare(self, speaker: Speaker, struck: Sequence[Struck], expected: list[bytes]) -> None:
        pixels = speaker.pixels
        if speaker.jumps and any(each.fault.service == "gateway" for each in struck):
            if abs(len(pixels) - len(expected)) > MAX_UNREAD_FRAMES:
                self.blame(f"a session had {len(pixels)} frames, about {len(expected)} expected", struck)
        elif len(pixels) != len(expected):
            self.blame(f"a session had {len(pixels)} frames, {len(expected)} expected", struck)
        elif speaker.jumps and not all(each.fault.is_exact for each in struck):
            first = speaker.jumps[0].index - speaker.seen[0].index
            self.distances.append(distance(pixels[first:], expected[first:]))
        else:
            self.counts["compared"] += 1
            if pixels != expected:
                self.blame("a session's frames are not those of an undisturbed one", struck)


def _row(name: str, struck: Sequence[Struck]) -> str:
    taken = sorted(taken_s for each in struck for taken_s in each.recoveries_s)
    places = [round(share * (len(taken) - 1)) for share in (0.5, 0.95, 1.0)] if taken else []
    times = [f"{taken[place]:7.2f} s" for place in places] or ["-".rjust(9)] * 3
    return f"{name:20}{len(struck):>6}{len(taken):>10}{''.join(times)}"
