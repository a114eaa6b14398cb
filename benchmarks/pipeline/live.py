"""Live sessions that share one pipeline: the largest number, and the steadiness of their frames.

The clients speak in real time, their starts spread evenly over a block, and show the first frame when it arrives.
Frames are counted from SETTLE_S after all have started.
"""

import asyncio
import json
from statistics import median

from tqdm import tqdm

from benchmarks.pipeline.client import START_S, Job, SessionReport, run_clients
from benchmarks.pipeline.contenders import Peer
from benchmarks.pipeline.metrics import interval_std, next_to_try, on_time
from benchmarks.pipeline.processes import start_program
from benchmarks.pipeline.suite import standin_suite
from benchmarks.row import Row, row
from benchmarks.standin.content import PUBLIC, SHORT, Content
from services.local.processes import Suite

ROUNDS = 5
STEP_S = 0.02
# Blocks that each session speaks: 6 s, of which about 2 s are not counted.
NUM_BLOCKS = 12
SETTLE_S = 1.5
BOUND = round(PUBLIC.block_s / STEP_S)
FEWEST = 17
ENOUGH = 0.995
LIMIT_S = 60.0


def session_rows() -> list[Row]:
    """Measure the largest number of live sessions whose frames arrive on time."""
    return asyncio.run(_sessions())


def continuity_rows() -> list[Row]:
    """Measure how steadily frames arrive at 90 % of the largest possible number of sessions."""
    return [*asyncio.run(_continuity()), *asyncio.run(_short_continuity())]


async def _sessions() -> list[Row]:
    most: list[int] = []
    async with standin_suite(STEP_S) as suite:
        await live_sessions(suite, 2, 4)  # opens the connections
        for _ in tqdm(range(ROUNDS), desc="sessions", disable=None):
            tried: dict[int, bool] = {}
            while (number := next_to_try(tried, FEWEST - 1, BOUND)) is not None:
                tried[number] = share_on_time(await live_sessions(suite, number, NUM_BLOCKS)) >= ENOUGH
            most.append(max((number for number, passes in tried.items() if passes), default=FEWEST - 1))
    found = median(most)
    note = f"tried from {FEWEST}, so fewer" if found < FEWEST else f"found {', '.join(str(each) for each in most)}"
    alone = int(PUBLIC.block_s / STEP_S / (PUBLIC.num_levels + 1))
    beside = {"gloo": 1.0, "loop": float(alone)}  # by design: one session per ring, one stage after another
    name = f"sessions per pipeline, stages of {STEP_S * 1e3:g} ms"
    return [row(name, found, "sessions", at_least=int(0.92 * BOUND), bound=BOUND, beside=beside, note=note)]


async def _continuity() -> list[Row]:
    num_sessions = int(0.9 * BOUND)
    shares, ours, sleepers, gloo = [], [], [], []
    async with standin_suite(STEP_S) as suite, (ring := Peer("gloo", STEP_S)).running():
        await live_sessions(suite, 2, 4)
        for _ in tqdm(range(ROUNDS), desc="continuity", disable=None):
            times_s = START_S + NUM_BLOCKS * PUBLIC.block_s, PUBLIC.block_s
            sleeper = await start_program("-m", "benchmarks.pipeline.sleeper", *map(str, times_s))
            sessions = await live_sessions(suite, num_sessions, NUM_BLOCKS)
            wakes, _ = await sleeper.communicate()
            sleepers.append(interval_std(json.loads(wakes)) * 1e3)
            shares.append(share_on_time(sessions))
            if not sessions:
                raise RuntimeError(f"one of {num_sessions} sessions was refused")
            ours.append(median(interval_std(_counted(each)) for each in sessions) * 1e3)
            gloo.append(interval_std((await ring.work("live", NUM_BLOCKS)).arrived_s) * 1e3)
    name = f"continuity, {num_sessions} sessions: "
    sleeper_ms = median(sleepers)
    deviation = row(
        f"{name}deviation of block intervals",
        median(ours),
        "ms",
        at_most=sleeper_ms + 2,
        bound=sleeper_ms,
        beside={"gloo": median(gloo)},
        note="bound: a bare process that sleeps; gloo: its only session",
    )
    return [row(f"{name}frames on time", median(shares), "", at_least=0.999, bound=1.0), deviation]


async def _short_continuity() -> list[Row]:
    """Measure the frames on time of blocks of one latent frame."""
    num_sessions = int(0.9 * round(SHORT.block_s / STEP_S))
    num_blocks = round(NUM_BLOCKS * PUBLIC.block_s / SHORT.block_s)
    shares = []
    async with standin_suite(STEP_S, content=SHORT) as suite:
        await live_sessions(suite, 2, 4, content=SHORT)
        for _ in tqdm(range(ROUNDS), desc="continuity, short blocks", disable=None):
            shares.append(share_on_time(await live_sessions(suite, num_sessions, num_blocks, content=SHORT)))
    name = f"continuity, blocks of {SHORT.block_s * 1e3:.0f} ms, {num_sessions} sessions: frames on time"
    return [row(name, median(shares), "", at_least=0.999, bound=1.0)]


async def live_sessions(
    suite: Suite, num_sessions: int, num_blocks: int, *, is_checked: bool = True, content: Content = PUBLIC
) -> list[SessionReport]:
    """Run live sessions; return no reports if one of them was refused. Raises RuntimeError for a wrong picture."""
    job = Job(
        suite.gateway,
        "live",
        num_blocks,
        num_sessions,
        is_checked=is_checked,
        block_latents=content.block_latents,
        num_levels=content.num_levels,
    )
    report = await run_clients(job, LIMIT_S)
    if any(each.wrong for each in report.sessions):
        raise RuntimeError(f"{sum(each.wrong for each in report.sessions)} pictures are wrong")
    return [] if any(each.refused or not each.arrivals for each in report.sessions) else report.sessions


def share_on_time(sessions: list[SessionReport]) -> float:
    """Return the share of all sessions' frames that arrived on time, once all had started; 0 without any."""
    if not sessions:
        return 0.0
    since = _since(sessions)
    counts = [on_time([arrival[:3] for arrival in each.arrivals], since) for each in sessions]
    total = sum(num_frames for _, num_frames in counts)
    return sum(num_on_time for num_on_time, _ in counts) / total if total else 0.0


def _since(sessions: list[SessionReport]) -> float:
    return max(each.arrived_s[0] for each in sessions) + SETTLE_S


def _counted(session: SessionReport) -> list[float]:
    start = session.arrived_s[0] + SETTLE_S + PUBLIC.block_s
    return [at for at in session.arrived_s if at >= start]
