"""The cost of knowing a fleet's workers, and the age of what a gateway knows of them.

`python -m benchmarks.fleet.discovery` runs an idle gateway for the addresses that it reads as JSON, and prints its
share of a core and the longest CPU time that its event loop spent at a stretch.
"""

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import psutil

from avatar.failover.discovery import Discovery
from avatar.failover.pool import ANSWER_S, WorkerPool
from avatar.settings import GatewaySettings
from avatar.store.redis import RedisHashes
from avatar.store.registry import WorkerRegistry
from avatar.store.sessions import SessionStore
from avatar.worker.v1 import denoiser_pb2, denoiser_pb2_grpc
from benchmarks.fleet.content import STAGES
from benchmarks.fleet.endpoints import Fleet
from benchmarks.pipeline.processes import start_program
from benchmarks.row import Row, row
from services.local.processes import Suite, free_ports, start_redis, until_healthy
from services.local.suite import gateway

NUM_ENDPOINTS = 12, 52, 202, 502
SETTLE_S, SECONDS, PROBE_S = 3.0, 5.0, 3.0
LIMIT_S = 120.0
MAX_SHARE, MAX_STALL_S, MAX_AGE_S = 0.04, 0.02, 1.5


def rows() -> list[Row]:
    """Measure an idle gateway over fleets of several sizes, and the age of states beside a frozen worker."""
    found = []
    for count in NUM_ENDPOINTS:
        share, stall_s = asyncio.run(idle(count))
        figure = f"fleet: idle gateway, {count} workers"
        found.append(row(figure, 100 * share, "%", at_most=100 * MAX_SHARE))
        figure, note = f"{figure}: longest turn of its event loop", "CPU time: waiting is not seen"
        found.append(row(figure, 1e3 * stall_s, "ms", at_most=1e3 * MAX_STALL_S, note=note))
    age_s = asyncio.run(oldest())
    found.append(row("fleet: oldest state beside a frozen worker", age_s, "s", at_most=MAX_AGE_S, note="of 12 workers"))
    return found


@asynccontextmanager
async def endpoints(redis_url: str, counts: dict[str, int], **fleet: Any) -> AsyncGenerator[tuple[Fleet, int], None]:
    """Run stand-in workers, so many of each stage, in a process while the body runs; yield the fleet and its pid."""
    ports = iter(free_ports(sum(counts.values())))
    targets = {stage: [f"127.0.0.1:{next(ports)}" for _ in range(count)] for stage, count in counts.items()}
    workers = Fleet(redis_url, targets, **fleet)
    process = await start_program("-m", "benchmarks.fleet.endpoints")
    try:
        await told(process, workers.to_json(), "ready")
        yield workers, process.pid
    finally:
        process.kill()
        await process.wait()


async def told(process: asyncio.subprocess.Process, line: str, answer: str = "") -> Any:
    """Send a line to a program, and return its answer, as JSON unless it is the expected one."""
    assert process.stdin
    assert process.stdout
    process.stdin.write(line.encode() + b"\n")
    await process.stdin.drain()
    async with asyncio.timeout(LIMIT_S):
        received = (await process.stdout.readline()).decode().strip()
    return None if answer and received == answer else json.loads(received)


@asynccontextmanager
async def redis() -> AsyncGenerator[str, None]:
    """Run Redis while the body runs; yield its URL."""
    with tempfile.TemporaryDirectory(prefix="avatar-bench-") as folder:
        [port] = free_ports(1)
        async with Suite(Path(folder), f"redis://127.0.0.1:{port}", {}) as suite:
            await start_redis(suite, port)
            await until_healthy(suite)
            yield suite.redis_url


async def idle(num_endpoints: int) -> tuple[float, float]:
    """Return an idle gateway's share of a core, and the longest turn of its event loop in seconds of CPU time."""
    others = dict.fromkeys(STAGES, 1)
    counts = {**others, "denoiser-0": num_endpoints - len(STAGES) + 1}
    async with redis() as url, endpoints(url, counts) as (fleet, _):
        process = await start_program("-m", "benchmarks.fleet.discovery")
        try:
            measured = await told(process, fleet.to_json())
            return measured["share"], measured["stall_s"]
        finally:
            process.kill()
            await process.wait()


async def oldest(seconds: float = 6.0) -> float:
    """Return the greatest age of a worker's numbers, in seconds, while another worker is frozen."""
    async with (
        redis() as url,
        endpoints(url, {"denoiser-0": 12}) as (fleet, _),
        endpoints(url, {"denoiser-0": 1}) as (frozen, pid),
    ):
        hashes = RedisHashes(url)
        discovery = Discovery(WorkerRegistry(hashes, "main").read)
        targets = fleet.targets["denoiser-0"] + frozen.targets["denoiser-0"]
        pool: WorkerPool[denoiser_pb2.DenoiserServiceGetInfoResponse] = WorkerPool(
            "denoiser", targets, ask, None, discovery
        )
        async with pool.running(), discovery.running():
            await asyncio.sleep(SETTLE_S)
            psutil.Process(pid).suspend()
            age_s, end_s = 0.0, time.monotonic() + seconds
            while time.monotonic() < end_s:
                await asyncio.sleep(0.02)
                states = [info for worker, info in pool.answering(lambda _: True) if worker.target not in targets[12:]]
                age_s = max(age_s, *(time.time() - info.step_s for info in states if info.step_s))
        await hashes.aclose()
    return age_s


async def ask(connection: grpc.aio.Channel) -> denoiser_pb2.DenoiserServiceGetInfoResponse:
    request = denoiser_pb2.DenoiserServiceGetInfoRequest()
    return await denoiser_pb2_grpc.DenoiserServiceStub(connection).GetInfo(request, timeout=ANSWER_S)


async def measure_gateway(fleet: Fleet) -> dict[str, float]:
    """Run an idle gateway in this process, and measure it."""
    settings = GatewaySettings(
        listen="127.0.0.1:0",
        redis_url=fleet.redis_url,
        audio=tuple(fleet.targets["audio"]),
        denoisers=tuple(target for stage in STAGES[1:-1] for target in fleet.targets[stage]),
        vae=tuple(fleet.targets["vae"]),
    )
    store = SessionStore(RedisHashes(settings.redis_url))
    async with gateway(store, settings):
        await asyncio.sleep(SETTLE_S)
        spent_s, started_s = time.process_time(), time.monotonic()
        await asyncio.sleep(SECONDS)
        share = (time.process_time() - spent_s) / (time.monotonic() - started_s)
        stall_s, end_s = 0.0, time.monotonic() + PROBE_S
        while time.monotonic() < end_s:
            before_s = time.thread_time()  # other programs of this machine do not count
            await asyncio.sleep(0.001)
            stall_s = max(stall_s, time.thread_time() - before_s)
    await store.aclose()
    return {"share": share, "stall_s": stall_s}


def main() -> None:
    print(json.dumps(asyncio.run(measure_gateway(Fleet(**json.loads(sys.stdin.readline()))))), flush=True)


if __name__ == "__main__":
    main()
