"""Hours of media as fast as they go: whether memory grows, and whether late positions are as good as early ones.

One session speaks past latent frame 45,000, three beside it make up the rest of 10,000 s. Stages take a millisecond,
messages have their real sizes, every picture is checked.
"""

import asyncio
import time
from bisect import bisect_right

from avatar.types import BLOCK_LATENTS, BLOCK_S
from benchmarks.pipeline.client import Heard, Job
from benchmarks.pipeline.figures import slope_per_hour
from benchmarks.pipeline.processes import clients, own_megabytes
from benchmarks.pipeline.suite import standing_in
from benchmarks.row import Row, row
from services.local.launch import Suite

MEDIA_S, POSITIONS = 10_000.0, 45_000
STEP_S = 0.001
LONG_BLOCKS = POSITIONS // BLOCK_LATENTS + 100
OTHERS = 3
OTHER_BLOCKS = -int(-(MEDIA_S / BLOCK_S - LONG_BLOCKS) // OTHERS)
# A slow machine is not waited for; the rows say how far it came.
LIMIT_S, CLOSE_S = 400.0, 60.0
SAMPLE_S = 1.0
# Of glibc's allocator: what is freed goes back at once. Otherwise it keeps some megabytes more or less at any moment,
# which in an hour of media would look like a leak.
GIVING_BACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
# Memory is measured once this share of the media is made: before, allocators fill, and the short sessions end.
WARM = 0.4


def rows() -> list[Row]:
    """Growth of the process that grows most, media, and the last position."""
    return asyncio.run(_rows())


async def _rows() -> list[Row]:
    async with standing_in(STEP_S, environment=GIVING_BACK) as suite:
        samples: list[tuple[float, dict[str, float]]] = []
        watching = asyncio.ensure_future(_watch(suite, samples))
        try:
            jobs = [
                Job(suite.gateway, "full", LONG_BLOCKS, 1, limit_s=LIMIT_S),
                Job(suite.gateway, "full", OTHER_BLOCKS, OTHERS, limit_s=LIMIT_S),
            ]
            reports = await asyncio.gather(*(clients(job, LIMIT_S + CLOSE_S) for job in jobs))
        finally:
            watching.cancel()
    sessions = [heard for report in reports for heard in report.sessions]
    if failed := [each for each in sessions if each.refused or each.wrong]:
        raise RuntimeError(f"a session had {failed[0].wrong} wrong pictures and ended: {failed[0].refused or 'well'}")
    media_s = sum(len(heard.arrivals) for heard in sessions) * BLOCK_S
    slopes = growth(sessions, samples)
    worst = max(slopes, key=lambda name: slopes[name])
    note = ", ".join(f"{name} {slope:.2f}" for name, slope in slopes.items())
    position = max(len(heard.arrivals) for heard in sessions) * BLOCK_LATENTS
    return [
        row("endurance: growth of memory", slopes[worst], "MB/h", at_most=1.0, bound=0.0, note=note),
        row("endurance: media", media_s, "s", at_least=MEDIA_S, note=f"in at most {LIMIT_S:g} s, 4 sessions"),
        row("endurance: last position", position, "latents", at_least=POSITIONS),
    ]


async def _watch(suite: Suite, samples: list[tuple[float, dict[str, float]]]) -> None:
    """Note the memory of every process again and again, until cancelled."""
    while True:
        await asyncio.sleep(SAMPLE_S)
        used = {name: own_megabytes(process.pid) for name, process in suite.processes.items()}
        samples.append((time.monotonic(), used))


def growth(sessions: list[Heard], samples: list[tuple[float, dict[str, float]]]) -> dict[str, float]:
    """By how many megabytes each process grew in an hour of media.

    samples: when, and megabytes of each process. Those before the warm share and behind the last block do not count.
    """
    came = sorted(at for heard in sessions for _, _, at, _ in heard.arrivals)
    made = [(bisect_right(came, at), used) for at, used in samples if at <= came[-1]]
    kept = [(count * BLOCK_S, used) for count, used in made if count >= WARM * len(came)]
    media_s = [media for media, _ in kept]
    return {name: slope_per_hour(media_s, [used[name] for _, used in kept]) for name in kept[0][1]}
