"""The gateway's cost per live session: its own CPU time while clients speak in real time.

Workers, clients and Redis are other processes. Every block is 12 messages in (4 pieces of audio, 1 block of features, 4
latents, 3 chunks of frames) and 9 out (6 to workers, 3 chunks of frames). `python -m benchmarks.fleet.gateway` prints
one run as JSON.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import grpc.aio
import psutil

from benchmarks.fleet.clients import Job, Report
from benchmarks.fleet.content import FRAME_RATE_HZ, SIZES, STAGES, Sizes
from benchmarks.pipeline.processes import start_program
from benchmarks.row import Row, row
from services.local.processes import Suite, free_ports, start_redis, until_healthy

SESSIONS, SECONDS, SETTLE_S, ROUNDS = 6, 10.0, 2.0, 3
LIMIT_S = 60.0
GATEWAY, RELAY = "gateway", "relay"
SHORT_BLOCK_FRAMES = 4
# Two thirds of the cost of 191ee63 by that of the bare relay, which ran in turns with it: 10.7 by 5.1 and 19.7 by 9.6.
TARGETS = {"tiny": 1.40, "14B": 1.37}


@dataclass(frozen=True)
class Cost:
    """Of one live session, per second: CPU-ms, and how often threads of the process wake up.

    idle_ms: CPU-ms per second of the process without sessions, which the session's do not include.
    """

    cpu_ms: float
    wakes: float
    idle_ms: float


def rows() -> list[Row]:
    """Measure the gateway's CPU time per live session, and bare grpc.aio's that relays the same messages."""
    found = []
    for name, sizes in SIZES.items():
        short = replace(sizes, block_frames=SHORT_BLOCK_FRAMES)
        runs = [
            [asyncio.run(measure(*each)) for each in ((sizes, GATEWAY), (sizes, RELAY), (short, GATEWAY))]
            for _ in range(ROUNDS)
        ]
        ours, bare, blocks = (median(each.cpu_ms for each in variant) for variant in zip(*runs, strict=True))
        figure = f"fleet: gateway per live session, {name}"
        note = f"{blocks:.3g} at blocks of 160 ms"
        found.append(row(figure, ours, "CPU-ms/s", at_most=TARGETS[name] * bare, bound=bare, note=note))
    return found


async def measure(
    sizes: Sizes,
    server: str,
    *,
    num_sessions: int = SESSIONS,
    seconds: float = SECONDS,
    takes_chunks: bool = True,
) -> Cost:
    """Return the cost of one of `num_sessions` live sessions, without the idle server's.

    server: GATEWAY or RELAY. takes_chunks: clients take frames that are ready together in one message.
    """
    async with running(sizes, server) as (suite, process):
        idle_ms, _ = await _cost_of(process, SETTLE_S)
        job = Job(suite.targets["gateway"], sizes.to_dict(), num_sessions, SETTLE_S + seconds + 0.5, takes_chunks)
        clients = await start_program("-m", "benchmarks.fleet.clients")
        assert clients.stdin
        assert clients.stdout
        try:
            async with asyncio.timeout(LIMIT_S):
                clients.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
                await clients.stdin.drain()
                if await clients.stdout.readline() != b"ready\n":
                    raise RuntimeError("the clients received no frames")
                await asyncio.sleep(SETTLE_S)
                busy_ms, wakes = await _cost_of(process, seconds)
                report = Report(**json.loads(await clients.stdout.readline()))
                await clients.wait()
        finally:
            if clients.returncode is None:
                clients.kill()
                await clients.wait()
    expected = num_sessions * job.seconds * FRAME_RATE_HZ
    if report.num_frames < 0.9 * expected or (server == GATEWAY and report.num_wrong):
        raise RuntimeError(f"{report.num_frames} of {expected:.0f} frames came, {report.num_wrong} of them wrong")
    return Cost((busy_ms - idle_ms) / num_sessions, wakes / num_sessions, idle_ms)


async def _cost_of(process: psutil.Process, seconds: float) -> tuple[float, float]:
    """Return a process's CPU-ms and wake-ups per second, measured from now on.

    The median of seconds: other programs of the machine, which share its caches, may disturb some of them.
    """
    spent_s, wakes, times_s = [cpu_s(process)], _wakes(process), [time.monotonic()]
    for _ in range(round(seconds)):
        await asyncio.sleep(1.0)
        spent_s.append(cpu_s(process))
        times_s.append(time.monotonic())
    shares = [(b - a) / (d - c) for (a, b), (c, d) in zip(pairwise(spent_s), pairwise(times_s), strict=True)]
    return median(shares) * 1e3, (_wakes(process) - wakes) / (times_s[-1] - times_s[0])


@asynccontextmanager
async def running(sizes: Sizes, server: str) -> AsyncGenerator[tuple[Suite, psutil.Process], None]:
    """Run Redis, the workers of all stages in one process, and the server; yield the suite and the server's process."""
    with tempfile.TemporaryDirectory(prefix="avatar-bench-") as folder:
        redis_port, gateway_port, *ports = free_ports(2 + len(STAGES))
        targets = [f"127.0.0.1:{port}" for port in ports]
        listen, text = f"127.0.0.1:{gateway_port}", json.dumps(sizes.to_dict())
        suite = Suite(Path(folder), f"redis://127.0.0.1:{redis_port}", dict(zip(STAGES, targets, strict=True)))
        try:
            await start_redis(suite, redis_port)
            await suite.start("workers", sys.executable, "-m", "benchmarks.fleet.workers", text, *targets)
            await until_healthy(suite)
            suite.targets[GATEWAY] = listen
            if server == RELAY:
                await suite.start(GATEWAY, sys.executable, "-m", "benchmarks.fleet.relay", listen, text, *targets)
                await _until_reachable(listen)
            else:
                environment = {
                    "AVATAR_LISTEN": listen,
                    "AVATAR_REDIS_URL": suite.redis_url,
                    "AVATAR_AUDIO": targets[0],
                    "AVATAR_DENOISERS": ",".join(targets[1:-1]),
                    "AVATAR_VAE": targets[-1],
                    "AVATAR_LOG_LEVEL": "WARNING",
                }
                await suite.start(GATEWAY, sys.executable, "-m", "services.gateway", **environment)
                await until_healthy(suite)
            yield suite, psutil.Process(suite.processes[GATEWAY].pid)
        finally:
            await suite.stop()


async def _until_reachable(target: str) -> None:
    async with grpc.aio.insecure_channel(target) as connection, asyncio.timeout(LIMIT_S):
        await connection.channel_ready()


def cpu_s(process: psutil.Process) -> float:
    """Return a process's CPU time in seconds, more precisely than in ticks of 10 ms."""
    return time.clock_gettime((~process.pid << 3) | 2)  # Linux: clock_getcpuclockid(3)


def _wakes(process: psutil.Process) -> int:
    """Return how often the process's threads have gone to sleep."""
    return sum(psutil.Process(thread.id).num_ctx_switches().voluntary for thread in process.threads())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fleet.gateway", description="Print one run as JSON.")
    parser.add_argument("--sizes", choices=tuple(SIZES), default="tiny", help="of the messages")
    parser.add_argument("--server", choices=(GATEWAY, RELAY), default=GATEWAY, help="the gateway, or bare grpc.aio")
    parser.add_argument("--sessions", type=int, default=SESSIONS, help="live sessions at a time")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of measurement")
    parser.add_argument("--single-frames", action="store_true", help="clients take a message for each frame")
    parser.add_argument("--block-frames", type=int, default=12, help="frames of a block")
    flags = parser.parse_args()
    sizes = replace(SIZES[flags.sizes], block_frames=flags.block_frames)
    options = {"num_sessions": flags.sessions, "seconds": flags.seconds, "takes_chunks": not flags.single_frames}
    cost = asyncio.run(measure(sizes, flags.server, **options))
    print(json.dumps(asdict(cost)))


if __name__ == "__main__":
    main()
