"""The arithmetic of figures: from when blocks came to rates, shares and percentiles. Times are seconds."""

from collections.abc import Sequence
from itertools import combinations, pairwise
from statistics import median, pstdev, quantiles

from benchmarks.standin.content import FRAME_RATE_HZ

# A frame may come so much later than it is due before it is late: the one before it is shown so long.
FRAME_S = 1 / FRAME_RATE_HZ
HOUR_S = 3600.0


def rank(values: Sequence[float], percent: int) -> float:
    """The value that so many percent of them stay within."""
    return quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def steady(sessions: Sequence[Sequence[float]], skip: int) -> list[list[float]]:
    """When blocks came while all sessions were at full speed: behind each one's first `skip`, before any one's last."""
    begin, end = max(times[skip] for times in sessions), min(times[-1] for times in sessions)
    return [[at for at in times if begin <= at <= end] for times in sessions]


def rate_hz(times: Sequence[float]) -> float:
    """Blocks a second."""
    ordered = sorted(times)
    return (len(ordered) - 1) / (ordered[-1] - ordered[0])


def fairness(sessions: Sequence[Sequence[float]]) -> float:
    """The fastest session's rate by the slowest's, 1 at best."""
    rates = [rate_hz(times) for times in sessions]
    return max(rates) / min(rates)


def on_time(arrivals: Sequence[tuple[int, int, float]], since: float = 0.0) -> tuple[int, int]:
    """Frames that came in time, and all of them, from `since` on: for a player that begins with the first that comes.

    arrivals: number of the first frame, how many come with it, when. A frame is late if it comes more than a frame's
    length behind its turn; the player then holds its picture, and all that follows is due so much later.
    """
    first, _, began = arrivals[0]
    in_time = num_frames = 0
    start = began - first * FRAME_S
    for index, count, at in arrivals:
        behind = [at - start - (index + number) * FRAME_S for number in range(count)]
        if at >= since:
            num_frames += count
            in_time += sum(each <= FRAME_S for each in behind)
        if behind[0] > FRAME_S:
            start += behind[0]
    return in_time, num_frames


def interval_std(times: Sequence[float]) -> float:
    """How much the intervals between blocks vary: their standard deviation."""
    return pstdev(b - a for a, b in pairwise(times))


def longest_pause(times: Sequence[float], since: float, until: float) -> float:
    """The longest time without a block that begins or ends in a span; up to its end, if none comes."""
    inside = [at for at in times if since <= at <= until]
    before = [at for at in times if at < since][-1:] or [since]
    after = [at for at in times if at > until][:1] or [until]
    return max(b - a for a, b in pairwise([*before, *inside, *after]))


def lost_and_doubled(arrivals: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Frames whose numbers never came between the first and the last, and frames that came again."""
    numbers = [index + number for index, count in arrivals for number in range(count)]
    seen = set(numbers)
    return max(numbers) + 1 - min(numbers) - len(seen), len(numbers) - len(seen)


def slope_per_hour(media_s: Sequence[float], megabytes: Sequence[float]) -> float:
    """By how much memory grows in an hour of media: the median slope from sample to sample (Theil and Sen).

    What leaks grows throughout. An allocator takes some megabytes at one moment and keeps them, which the slope of the
    nearest straight line would take for a leak.
    """
    samples = list(zip(media_s, megabytes, strict=True))
    slopes = [(more - less) / (later - sooner) for (sooner, less), (later, more) in combinations(samples, 2)]
    return median(slopes) * HOUR_S


def most_that_pass(tried: dict[int, bool], low: int, high: int) -> int | None:
    """The next number to try between two, by halves; None once it is known which is the last that passes.

    tried: what passed so far. `low` counts as passed without being tried.
    """
    passed = max((number for number, passes in tried.items() if passes), default=low)
    failed = min((number for number, passes in tried.items() if not passes), default=high + 1)
    return None if failed - passed <= 1 else (passed + failed) // 2
