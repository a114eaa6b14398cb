"""Live sessions that share one pipeline: how many it carries, and how steadily their frames come.

Their clients speak in real time, begun evenly over a block, and show the first frame when it comes. Frames count from a
second after all have begun.
"""

import asyncio
import json
from statistics import median

from tqdm import tqdm

from avatar.types import BLOCK_S
from benchmarks.pipeline.client import START_S, Heard, Job
from benchmarks.pipeline.contenders import Peer
from benchmarks.pipeline.figures import interval_std, most_that_pass, on_time
from benchmarks.pipeline.processes import clients, started
from benchmarks.pipeline.suite import standing_in
from benchmarks.row import Row, row
from benchmarks.standin.content import NUM_LEVELS
from services.local.launch import Suite

ROUNDS = 5
STEP_S = 0.02
# Blocks that each session speaks: 6 s, of which about 2 s do not count.
NUM_BLOCKS = 12
SETTLE_S = 1.5
BOUND = round(BLOCK_S / STEP_S)
FEWEST = 17
ENOUGH = 0.995
LIMIT_S = 60.0


def session_rows() -> list[Row]:
    """The most live sessions whose frames come in time."""
    return asyncio.run(_sessions())


def continuity_rows() -> list[Row]:
    """How steadily frames come with nine tenths of as many sessions as there could be."""
    return asyncio.run(_continuity())


async def _sessions() -> list[Row]:
    most: list[int] = []
    async with standing_in(STEP_S) as suite:
        await conversed(suite, 2, 4)  # connections are made
        for _ in tqdm(range(ROUNDS), desc="sessions", disable=None):
            tried: dict[int, bool] = {}
            while (number := most_that_pass(tried, FEWEST - 1, BOUND)) is not None:
                tried[number] = share_on_time(await conversed(suite, number, NUM_BLOCKS)) >= ENOUGH
            most.append(max((number for number, passes in tried.items() if passes), default=FEWEST - 1))
    found = median(most)
    note = f"tried from {FEWEST}, so fewer" if found < FEWEST else f"found {', '.join(str(each) for each in most)}"
    alone = int(BLOCK_S / STEP_S / (NUM_LEVELS + 1))
    beside = {"gloo": 1.0, "loop": float(alone)}  # by their making: one session a ring, one stage after another
    name = f"sessions per pipeline, stages of {STEP_S * 1e3:g} ms"
    return [row(name, found, "sessions", at_least=int(0.92 * BOUND), bound=BOUND, beside=beside, note=note)]


async def _continuity() -> list[Row]:
    num_sessions = int(0.9 * BOUND)
    shares, ours, sleepers, gloo = [], [], [], []
    async with standing_in(STEP_S) as suite, (ring := Peer("gloo", STEP_S)).running():
        await conversed(suite, 2, 4)
        for _ in tqdm(range(ROUNDS), desc="continuity", disable=None):
            sleeper = await started("-m", "benchmarks.pipeline.sleeper", str(START_S + NUM_BLOCKS * BLOCK_S))
            heard = await conversed(suite, num_sessions, NUM_BLOCKS)
            woke, _ = await sleeper.communicate()
            sleepers.append(interval_std(json.loads(woke)) * 1e3)
            shares.append(share_on_time(heard))
            if not heard:
                raise RuntimeError(f"one of {num_sessions} sessions was refused")
            ours.append(median(interval_std(_counted(each)) for each in heard) * 1e3)
            gloo.append(interval_std((await ring.work("live", NUM_BLOCKS)).came_s) * 1e3)
    name = f"continuity, {num_sessions} sessions: "
    sleeper_ms = median(sleepers)
    deviation = row(
        f"{name}deviation of block intervals",
        median(ours),
        "ms",
        at_most=sleeper_ms + 2,
        bound=sleeper_ms,
        beside={"gloo": median(gloo)},
        note="bound: a bare process that sleeps; gloo: its one session alone",
    )
    return [row(f"{name}frames on time", median(shares), "", at_least=0.999, bound=1.0), deviation]


async def conversed(suite: Suite, num_sessions: int, num_blocks: int, *, is_checked: bool = True) -> list[Heard]:
    """What live sessions heard; nothing if one of them was refused. RuntimeError if one gets a wrong picture."""
    report = await clients(Job(suite.gateway, "live", num_blocks, num_sessions, is_checked=is_checked), LIMIT_S)
    if any(each.wrong for each in report.sessions):
        raise RuntimeError(f"{sum(each.wrong for each in report.sessions)} pictures are wrong")
    return [] if any(each.refused or not each.arrivals for each in report.sessions) else report.sessions


def share_on_time(sessions: list[Heard]) -> float:
    """The share of all sessions' frames that came in time, once all had begun; 0 of no sessions."""
    if not sessions:
        return 0.0
    since = _since(sessions)
    counts = [on_time([(index, count, at) for index, count, at, _ in each.arrivals], since) for each in sessions]
    return sum(in_time for in_time, _ in counts) / sum(total for _, total in counts)


def _since(sessions: list[Heard]) -> float:
    return max(each.arrivals[0][2] for each in sessions) + SETTLE_S


def _counted(heard: Heard) -> list[float]:
    began = heard.arrivals[0][2] + SETTLE_S + BLOCK_S
    return [at for _, _, at, _ in heard.arrivals if at >= began]
