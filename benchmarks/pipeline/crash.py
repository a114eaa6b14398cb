"""What clients see of a worker that is killed: each stage in turn, one spare worker a stage, sessions live.

A worker that was killed is started again, and is the spare of the next round.
"""

import asyncio
import time
from statistics import median

import psutil
from tqdm import tqdm

from avatar.rpc.channel import channel
from avatar.types import BLOCK_FRAMES, BLOCK_S
from avatar.worker.v1 import audio_pb2, audio_pb2_grpc, denoiser_pb2, denoiser_pb2_grpc, vae_pb2, vae_pb2_grpc
from benchmarks.pipeline.client import START_S, Heard, Job, Report
from benchmarks.pipeline.contenders import Peer
from benchmarks.pipeline.figures import longest_pause, lost_and_doubled, rank
from benchmarks.pipeline.processes import clients
from benchmarks.pipeline.suite import STAGES, standing_in, start_worker, workers_of
from benchmarks.row import Row, row
from services.local.launch import Suite, until_healthy

ROUNDS = 5
STEP_S = 0.02
SESSIONS = 4
# From when all sessions are open; each loss is watched for so long before the next.
SETTLE_S, WATCH_S, RESTART_S = 1.5, 2.5, 0.5
OPEN_S = 30.0
NUM_BLOCKS = round((START_S + SETTLE_S + len(STAGES) * (WATCH_S + RESTART_S)) / BLOCK_S)
LIMIT_S = 120.0


def rows() -> list[Row]:
    """The pause that a killed worker makes, and the frames that are lost or come twice."""
    return asyncio.run(_rows())


async def _rows() -> list[Row]:
    pauses: dict[str, list[float]] = {stage: [] for stage in STAGES}
    lost, doubled, ended = [], [], 0
    async with standing_in(STEP_S, workers=2) as suite:
        for _ in tqdm(range(ROUNDS), desc="crashes", disable=None):
            await until_healthy(suite)
            job = Job(suite.gateway, "live", NUM_BLOCKS, SESSIONS)
            talking = asyncio.ensure_future(clients(job, LIMIT_S))
            try:
                killed = await _kill_each(suite)
                report: Report = await talking
            finally:
                talking.cancel()
            for stage, at in killed.items():
                pauses[stage] += [pause(heard, at) for heard in report.sessions if is_watched(heard, at)]
            counts = [lost_or_doubled(heard) for heard in report.sessions]
            lost.append(sum(count for count, _ in counts))
            doubled.append(sum(count for _, count in counts))
            ended += sum(bool(heard.refused) for heard in report.sessions)
    everything = [each for values in pauses.values() for each in values]
    worst = ", ".join(f"{stage} {rank(values, 95):.2f}" for stage, values in pauses.items() if values)
    name = "crash, kill -9 of each stage: "
    note = f"from frame to frame, a block in it; p95 of {worst}; gloo: started again at once, its session lost"
    ring = {"gloo": await ring_again_s()}
    failed = f"{ended} of {ROUNDS * SESSIONS} sessions ended" if ended else ""
    return [
        row(
            f"{name}time to next frame, p95",
            rank(everything, 95),
            "s",
            at_most=1.5,
            bound=BLOCK_S,
            beside=ring,
            note=note,
        ),
        row(f"{name}frames lost or wrong", median(lost), "", at_most=0, bound=0, note=failed),
        row(f"{name}frames doubled", median(doubled), "", at_most=0, bound=0),
    ]


async def ring_again_s() -> float:
    """Seconds from the loss of a rank of the ring, which ends it, to the first frame of one that is started at once."""
    async with (lost := Peer("gloo", STEP_S)).running():
        await lost.work("alone", 2)
        ranks = [each for each in psutil.Process(lost.pid).children() if "spawn_main" in " ".join(each.cmdline())]
        ranks[len(ranks) // 2].kill()
        at = time.monotonic()
    async with (again := Peer("gloo", STEP_S)).running():
        return (await again.work("alone", 1)).came_s[0] - at


async def _kill_each(suite: Suite) -> dict[str, float]:
    """Kill the worker that each stage's streams are at, one after another; when."""
    until = time.monotonic() + OPEN_S
    while sum((await _active(suite, STAGES[-1])).values()) < SESSIONS and time.monotonic() < until:  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    await asyncio.sleep(SETTLE_S)
    killed: dict[str, float] = {}
    for stage in STAGES:
        active = await _active(suite, stage)
        name = max(active, key=lambda each: active[each])
        process = suite.processes[name]
        process.kill()
        killed[stage] = time.monotonic()
        await process.wait()
        await asyncio.sleep(WATCH_S)
        await start_worker(suite, name, STEP_S)
    return killed


async def _active(suite: Suite, stage: str) -> dict[str, int]:
    """How many streams each worker of a stage has."""
    active: dict[str, int] = {}
    for name in workers_of(stage, 2):
        async with channel(suite.targets[name]) as to_it:
            if stage == "audio":
                told = await audio_pb2_grpc.AudioServiceStub(to_it).GetInfo(audio_pb2.AudioServiceGetInfoRequest())
                active[name] = told.active
            elif stage == "vae":
                decoder = await vae_pb2_grpc.VaeServiceStub(to_it).GetInfo(vae_pb2.VaeServiceGetInfoRequest())
                active[name] = decoder.active
            else:
                method = denoiser_pb2_grpc.DenoiserServiceStub(to_it).GetInfo
                active[name] = (await method(denoiser_pb2.DenoiserServiceGetInfoRequest())).active
    return active


def is_watched(heard: Heard, at: float) -> bool:
    """Whether a session went on to the end of the watch, or was ended by what was done to it."""
    return bool(heard.refused) or heard.arrivals[-1][2] >= at + WATCH_S


def pause(heard: Heard, at: float) -> float:
    """The longest time between frames once a worker was killed; all of the watch, if none came again."""
    times = [arrived for _, _, arrived, _ in heard.arrivals]
    if heard.refused and (not times or times[-1] < at + WATCH_S):
        return WATCH_S
    return longest_pause(times, at, at + WATCH_S)


def lost_or_doubled(heard: Heard) -> tuple[int, int]:
    """Frames that never came or are wrong, and frames that came twice; what a session that ended early did not show."""
    numbered = [(index, count) for index, count, _, _ in heard.arrivals]
    lost, doubled = lost_and_doubled(numbered) if numbered else (0, 0)
    spoken = sum(count for _, count, _, is_idle in heard.arrivals if not is_idle)
    unsaid = max(0, NUM_BLOCKS * BLOCK_FRAMES - spoken) if heard.refused else 0
    return lost + unsaid + heard.wrong * BLOCK_FRAMES, doubled
