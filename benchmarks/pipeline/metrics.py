"""Metrics of a run: arrival times of blocks to rates, shares and percentiles. Times are seconds."""

from collections.abc import Sequence
from itertools import combinations, pairwise
from statistics import median, pstdev, quantiles

from benchmarks.standin.content import FRAME_RATE_HZ

# A frame is late if it arrives more than this after it is due: the previous frame is shown this long anyway.
FRAME_S = 1 / FRAME_RATE_HZ
HOUR_S = 3600.0


class TooSlowError(RuntimeError):
    """The machine produced too little in the time of a measurement."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"too slow to measure: {reason}")


def percentile(values: Sequence[float], percent: int) -> float:
    """Return the value that `percent` percent of the values do not exceed. Raises TooSlowError without values."""
    if not values:
        raise TooSlowError("nothing arrived in time")
    return quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def steady(sessions: Sequence[Sequence[float]], skip: int) -> list[list[float]]:
    """Return the arrivals while all sessions run at full speed: after each one's first `skip`, before any last.

    Raises TooSlowError if a session has no more arrivals than `skip`.
    """
    fewest = min(map(len, sessions), default=0)
    if fewest <= skip:
        raise TooSlowError(f"a session received {fewest} blocks, more than {skip} are needed")
    start, end = max(times[skip] for times in sessions), min(times[-1] for times in sessions)
    return [[at for at in times if start <= at <= end] for times in sessions]


def rate_hz(times: Sequence[float]) -> float:
    """Return the rate of blocks. Raises TooSlowError for fewer than two."""
    ordered = sorted(times)
    if not ordered or ordered[0] == ordered[-1]:
        raise TooSlowError(f"{len(ordered)} blocks have no rate")
    return (len(ordered) - 1) / (ordered[-1] - ordered[0])


def fairness(sessions: Sequence[Sequence[float]]) -> float:
    """Return the fastest session's rate divided by the slowest's; 1 is best."""
    rates = [rate_hz(times) for times in sessions]
    return max(rates) / min(rates)


def on_time(arrivals: Sequence[tuple[int, int, float]], since: float = 0.0) -> tuple[int, int]:
    """Return how many frames arrived on time from `since` on, and how many arrived at all.

    arrivals: number of the first frame, number of frames, arrival time. The player starts with the first arrival. A
    frame is late if it arrives more than a frame's duration after it is due; the player then holds its last frame, and
    all later frames are due that much later.
    """
    if not arrivals:
        return 0, 0
    first, _, first_at = arrivals[0]
    num_on_time = num_frames = 0
    start = first_at - first * FRAME_S
    for index, count, at in arrivals:
        delays = [at - start - (index + number) * FRAME_S for number in range(count)]
        if at >= since:
            num_frames += count
            num_on_time += sum(delay <= FRAME_S for delay in delays)
        if delays[0] > FRAME_S:
            start += delays[0]
    return num_on_time, num_frames


def interval_std(times: Sequence[float]) -> float:
    """Return the standard deviation of the intervals between blocks. Raises TooSlowError for fewer than two."""
    if len(times) < 2:
        raise TooSlowError(f"{len(times)} blocks have no intervals")
    return pstdev(b - a for a, b in pairwise(times))


def longest_pause(times: Sequence[float], since: float, until: float) -> float:
    """Return the longest interval without a block that starts or ends in a span.

    It ends with the span if no block follows.
    """
    inside = [at for at in times if since <= at <= until]
    before = [at for at in times if at < since][-1:] or [since]
    after = [at for at in times if at > until][:1] or [until]
    return max(b - a for a, b in pairwise([*before, *inside, *after]))


def lost_and_duplicated(arrivals: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the number of frames missing between the first and the last, and of frames that arrived again.

    arrivals: number of the first frame, number of frames.
    """
    numbers = [index + number for index, count in arrivals for number in range(count)]
    seen = set(numbers)
    return max(numbers) + 1 - min(numbers) - len(seen), len(numbers) - len(seen)


def slope_per_hour(media_s: Sequence[float], megabytes: Sequence[float]) -> float:
    """Return the growth of memory per hour of media, in MB: the median slope between samples (Theil-Sen).

    A leak grows throughout. An allocator takes some megabytes once and keeps them, which a least-squares line would
    mistake for a leak. Raises TooSlowError if no media was rendered between samples.
    """
    pairs = combinations(zip(media_s, megabytes, strict=True), 2)
    slopes = [(more - less) / (later - sooner) for (sooner, less), (later, more) in pairs if later > sooner]
    if not slopes:
        raise TooSlowError("no block was rendered between two samples of memory")
    return median(slopes) * HOUR_S


def next_to_try(tried: dict[int, bool], low: int, high: int) -> int | None:
    """Return the next number of a bisection for the largest that passes; None once it is found.

    tried: numbers tried so far, and whether each passed. `low` counts as passed without a try.
    """
    passed = max((number for number, passes in tried.items() if passes), default=low)
    failed = min((number for number, passes in tried.items() if not passes), default=high + 1)
    return None if failed - passed <= 1 else (passed + failed) // 2
