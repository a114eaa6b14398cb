"""Effect of a killed worker on live sessions: each stage in turn, with one spare worker per stage.

A killed worker is restarted and becomes the spare of the next round.
"""

import asyncio
import time
from statistics import median

import psutil
from tqdm import tqdm

from avatar.rpc.channel import channel
from avatar.worker.v1 import audio_pb2, audio_pb2_grpc, denoiser_pb2, denoiser_pb2_grpc, vae_pb2, vae_pb2_grpc
from benchmarks.pipeline.client import START_S, Job, Report, SessionReport, run_clients
from benchmarks.pipeline.contenders import Peer
from benchmarks.pipeline.metrics import TooSlowError, longest_pause, lost_and_duplicated, percentile
from benchmarks.pipeline.suite import STAGES, standin_suite, start_worker, workers_of
from benchmarks.row import Row, row
from benchmarks.standin.content import PUBLIC
from services.local.processes import Suite, until_healthy

ROUNDS = 5
STEP_S = 0.02
SESSIONS = 4
# Seconds after all sessions are open, of watching each loss, and after each restart.
SETTLE_S, WATCH_S, RESTART_S = 1.5, 2.5, 0.5
OPEN_S = 30.0
NUM_BLOCKS = round((START_S + SETTLE_S + len(STAGES) * (WATCH_S + RESTART_S)) / PUBLIC.block_s)
LIMIT_S = 120.0


def rows() -> list[Row]:
    """Measure the pause that a killed worker causes, and the frames that are lost or duplicated."""
    return asyncio.run(_rows())


async def _rows() -> list[Row]:
    pauses: dict[str, list[float]] = {stage: [] for stage in STAGES}
    lost, duplicated, ended = [], [], 0
    async with standin_suite(STEP_S, workers=2) as suite:
        for _ in tqdm(range(ROUNDS), desc="crashes", disable=None):
            await until_healthy(suite)
            job = Job(suite.gateway, "live", NUM_BLOCKS, SESSIONS)
            speaking = asyncio.ensure_future(run_clients(job, LIMIT_S))
            try:
                killed = await _kill_each(suite)
                report: Report = await speaking
            finally:
                speaking.cancel()
            for stage, at in killed.items():
                pauses[stage] += [pause(session, at) for session in report.sessions if is_watched(session, at)]
            counts = [lost_or_duplicated(session) for session in report.sessions]
            lost.append(sum(count for count, _ in counts))
            duplicated.append(sum(count for _, count in counts))
            ended += sum(bool(session.refused) for session in report.sessions)
    everything = [each for values in pauses.values() for each in values]
    worst = ", ".join(f"{stage} {percentile(values, 95):.2f}" for stage, values in pauses.items() if values)
    name = "crash, kill -9 of each stage: "
    note = f"from frame to frame, including a block; p95 of {worst}; gloo: restarted at once, its session lost"
    ring = {"gloo": await ring_restart_s()}
    failed = f"{ended} of {ROUNDS * SESSIONS} sessions ended" if ended else ""
    return [
        row(
            f"{name}time to next frame, p95",
            percentile(everything, 95),
            "s",
            at_most=1.5,
            bound=PUBLIC.block_s,
            beside=ring,
            note=note,
        ),
        row(f"{name}frames lost or wrong", median(lost), "", at_most=0, bound=0, note=failed),
        row(f"{name}frames duplicated", median(duplicated), "", at_most=0, bound=0),
    ]


async def ring_restart_s() -> float:
    """Return the seconds from the loss of a rank, which ends the ring, to the first frame of a new ring."""
    async with (lost := Peer("gloo", STEP_S)).running():
        await lost.work("alone", 2)
        ranks = [each for each in psutil.Process(lost.pid).children() if "spawn_main" in " ".join(each.cmdline())]
        if not ranks:
            raise RuntimeError("the ring has no ranks")
        ranks[len(ranks) // 2].kill()
        at = time.monotonic()
    async with (again := Peer("gloo", STEP_S)).running():
        if not (arrived_s := (await again.work("alone", 1)).arrived_s):
            raise TooSlowError("the restarted ring rendered no block")
        return arrived_s[0] - at


async def _kill_each(suite: Suite) -> dict[str, float]:
    """Kill the busiest worker of each stage, one after another, and return the times."""
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
    """Return the number of streams of each worker of a stage."""
    active: dict[str, int] = {}
    for name in workers_of(stage, 2):
        async with channel(suite.targets[name]) as to_worker:
            if stage == "audio":
                info = await audio_pb2_grpc.AudioServiceStub(to_worker).GetInfo(audio_pb2.AudioServiceGetInfoRequest())
                active[name] = info.active
            elif stage == "vae":
                decoder = await vae_pb2_grpc.VaeServiceStub(to_worker).GetInfo(vae_pb2.VaeServiceGetInfoRequest())
                active[name] = decoder.active
            else:
                method = denoiser_pb2_grpc.DenoiserServiceStub(to_worker).GetInfo
                active[name] = (await method(denoiser_pb2.DenoiserServiceGetInfoRequest())).active
    return active


def is_watched(session: SessionReport, at: float) -> bool:
    """Return whether a session ran until the end of the watch, or was ended by the loss."""
    return bool(session.refused) or (bool(session.arrivals) and session.arrivals[-1].at_s >= at + WATCH_S)


def pause(session: SessionReport, at: float) -> float:
    """Return the longest time between frames after a worker was killed; the whole watch if no frame followed."""
    times = session.arrived_s
    if session.refused and (not times or times[-1] < at + WATCH_S):
        return WATCH_S
    return longest_pause(times, at, at + WATCH_S)


def lost_or_duplicated(session: SessionReport) -> tuple[int, int]:
    """Return the number of missing or wrong frames, and of duplicated ones.

    For a session that ended early, the frames that it did not show are missing too.
    """
    numbered = [(each.first_frame, each.num_frames) for each in session.arrivals]
    lost, duplicated = lost_and_duplicated(numbered) if numbered else (0, 0)
    spoken = sum(each.num_frames for each in session.arrivals if not each.is_idle)
    unspoken = max(0, NUM_BLOCKS * PUBLIC.block_frames - spoken) if session.refused else 0
    return lost + unspoken + session.wrong * PUBLIC.block_frames, duplicated
