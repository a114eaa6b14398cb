"""Hours of media, rendered as fast as possible: growth of memory, and correctness at late positions.

One session speaks past latent frame 45,000; three concurrent ones add up to 10,000 s of media. Stages take a
millisecond, messages have their real sizes, and every picture is checked.
"""

import asyncio
import time
from bisect import bisect_right

from benchmarks.pipeline.client import Job, SessionReport, run_clients
from benchmarks.pipeline.metrics import TooSlowError, slope_per_hour
from benchmarks.pipeline.processes import unshared_megabytes
from benchmarks.pipeline.suite import standin_suite
from benchmarks.row import Row, row
from benchmarks.standin.content import PUBLIC
from services.local.processes import Suite

MEDIA_S, POSITIONS = 10_000.0, 45_000
STEP_S = 0.001
LONG_BLOCKS = POSITIONS // PUBLIC.block_latents + 100
OTHERS = 3
OTHER_BLOCKS = -int(-(MEDIA_S / PUBLIC.block_s - LONG_BLOCKS) // OTHERS)
# On a slow machine the run stops here; the rows say how far it got.
LIMIT_S, CLOSE_S = 400.0, 60.0
SAMPLE_S = 1.0
# Makes glibc's allocator return freed memory at once. Otherwise it keeps a varying number of megabytes, which would
# look like a leak in an hour of media.
MALLOC_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
# Share of the media after which memory is measured: before that, allocators fill and the short sessions end.
WARM = 0.4


def rows() -> list[Row]:
    """Measure the growth of the process that grows most, the media rendered, and the last position."""
    return asyncio.run(_rows())


async def _rows() -> list[Row]:
    async with standin_suite(STEP_S, environment=MALLOC_ENVIRONMENT) as suite:
        samples: list[tuple[float, dict[str, float]]] = []
        sampling = asyncio.ensure_future(_sample(suite, samples))
        try:
            jobs = [
                Job(suite.gateway, "full", LONG_BLOCKS, 1, limit_s=LIMIT_S),
                Job(suite.gateway, "full", OTHER_BLOCKS, OTHERS, limit_s=LIMIT_S),
            ]
            reports = await asyncio.gather(*(run_clients(job, LIMIT_S + CLOSE_S) for job in jobs))
        finally:
            sampling.cancel()
    sessions = [session for report in reports for session in report.sessions]
    if failed := [each for each in sessions if each.refused or each.wrong]:
        raise RuntimeError(
            f"a session received {failed[0].wrong} wrong pictures and ended: {failed[0].refused or 'normally'}"
        )
    media_s = sum(len(session.arrivals) for session in sessions) * PUBLIC.block_s
    slopes = growth(sessions, samples)
    worst = max(slopes, key=lambda name: slopes[name])
    note = ", ".join(f"{name} {slope:.2f}" for name, slope in slopes.items())
    position = max(len(session.arrivals) for session in sessions) * PUBLIC.block_latents
    return [
        row("endurance: growth of memory", slopes[worst], "MB/h", at_most=1.0, bound=0.0, note=note),
        row("endurance: media", media_s, "s", at_least=MEDIA_S, note=f"in at most {LIMIT_S:g} s, 4 sessions"),
        row("endurance: last position", position, "latents", at_least=POSITIONS),
    ]


async def _sample(suite: Suite, samples: list[tuple[float, dict[str, float]]]) -> None:
    """Record the memory of every process periodically, until cancelled."""
    while True:
        await asyncio.sleep(SAMPLE_S)
        used = {name: unshared_megabytes(process.pid) for name, process in suite.processes.items()}
        samples.append((time.monotonic(), used))


def growth(sessions: list[SessionReport], samples: list[tuple[float, dict[str, float]]]) -> dict[str, float]:
    """Return each process's growth in megabytes per hour of media.

    samples: time, and megabytes of each process. Samples before the warm share or after the last block are ignored.
    """
    arrived = sorted(at for session in sessions for at in session.arrived_s)
    if not arrived:
        raise TooSlowError("no session received a block")
    counted = [(bisect_right(arrived, at), used) for at, used in samples if at <= arrived[-1]]
    kept = [(count * PUBLIC.block_s, used) for count, used in counted if count >= WARM * len(arrived)]
    if not kept:
        raise TooSlowError("memory was not sampled before the last block")
    media_s = [media for media, _ in kept]
    return {name: slope_per_hour(media_s, [used[name] for _, used in kept]) for name in kept[0][1]}
