"""Efficiency relative to the slowest stage, cost of a hop, and fairness between sessions.

All contenders run at once and take turns, round by round.
"""

import asyncio
from collections import defaultdict
from statistics import median

from tqdm import tqdm

from benchmarks.pipeline.contenders import SUITE, contenders
from benchmarks.pipeline.metrics import fairness, percentile, rate_hz, steady
from benchmarks.pipeline.suite import AUDIO_STEP_S
from benchmarks.row import Row, row
from benchmarks.standin.content import NUM_LEVELS

ROUNDS = 5
STAGES = NUM_LEVELS + 1
# Blocks until all stages are busy, and concurrent sessions.
FILL, SESSIONS = 8, 4
SHORT_S, LONG_S = 0.02, 0.265
# One stage after another: a block takes five times as long, and no warm-up is needed.
SEQUENTIAL = "loop"
EFFICIENCY = "pipeline efficiency"


def efficiency_rows() -> list[Row]:
    """Measure the share of the slowest stage's rate, with one session and with four, and the four's fairness."""
    return asyncio.run(_efficiencies())


def hop_rows() -> list[Row]:
    """Measure the cost of handing a block on, with no other block in flight."""
    return asyncio.run(_hops())


async def _efficiencies() -> list[Row]:
    short, many, fair = await _efficiency(SHORT_S, num_blocks=FILL + 120, is_many=True)
    long, _, _ = await _efficiency(LONG_S, num_blocks=FILL + 30, is_many=False)
    ours, ours_long = short.pop(SUITE), long.pop(SUITE)
    name = f"{EFFICIENCY}, stages of {SHORT_S * 1e3:g} ms"
    one = "one session; each block is handed on before the next is taken"
    return [
        row(f"{name}, {SESSIONS} sessions", median(many), "", at_least=0.98, bound=1.0, beside=short),
        row(f"{name}, one session", ours, "", bound=1.0, beside=short, note=one),
        row(f"{EFFICIENCY}, stages of {LONG_S * 1e3:g} ms", ours_long, "", at_least=0.995, bound=1.0, beside=long),
        row("fairness, fastest session / slowest", median(fair), "", at_most=1.02, bound=1.0, note=f"of {SESSIONS}"),
    ]


async def _efficiency(
    step_s: float, num_blocks: int, *, is_many: bool
) -> tuple[dict[str, float], list[float], list[float]]:
    """Return all median efficiencies with one session, and the suite's with several and its fairness per round."""
    efficiencies: dict[str, list[float]] = defaultdict(list)
    many: list[float] = []
    fair: list[float] = []
    async with contenders(step_s) as (ours, everyone):
        for _ in tqdm(range(ROUNDS), desc=f"efficiency, {step_s * 1e3:g} ms", disable=None):
            for name, contender in everyone.items():
                skip, count = (0, num_blocks // STAGES) if name == SEQUENTIAL else (FILL, num_blocks)
                arrived = (await contender.work("full", count)).arrived_s
                efficiencies[name].append(step_s * rate_hz(steady([arrived], skip)[0]))
            if is_many:
                sessions = steady(
                    [each.arrived_s for each in await ours.sessions("full", num_blocks // 2, SESSIONS)], FILL
                )
                many.append(step_s * rate_hz([at for times in sessions for at in times]))
                fair.append(fairness(sessions))
    return {name: median(values) for name, values in efficiencies.items()}, many, fair


async def _hops() -> list[Row]:
    rounds: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    async with contenders(SHORT_S) as (_, everyone):
        for _ in tqdm(range(ROUNDS), desc="hops", disable=None):
            for name, contender in everyone.items():
                report = await contender.work("alone", 30)
                own_s = STAGES * SHORT_S + AUDIO_STEP_S
                pairs = zip(report.sent_s, report.arrived_s, strict=True)
                over_ms = [(arrived - sent - own_s) * 1e3 / contender.hops for sent, arrived in pairs]
                cpu_ms = report.cpu_s * 1e3 / contender.hops / len(over_ms)
                rounds[name].append((percentile(over_ms, 50), percentile(over_ms, 99), cpu_ms))
    names = ("p50", "p99", "CPU time")
    units, targets = ("ms", "ms", "CPU-ms"), (2.0, 8.0, 2.5)
    rows = []
    for place, (name, unit, target) in enumerate(zip(names, units, targets, strict=True)):
        values = {each: median(values[place] for values in rounds[each]) for each in rounds}
        ours = values.pop(SUITE)
        rows.append(row(f"overhead per hop, {name}", ours, unit, at_most=target, bound=0.0, beside=values))
    return rows
