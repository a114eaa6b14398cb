"""Sessions that arrive at once: refusals where a level's workers are full, and the spread where they are free.

Live sessions beside the refusals show whether these delay frames.
"""

import asyncio
import sys
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import grpc.aio
import psutil

from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import avatar_service_pb2_grpc as pb_grpc
from avatar.v1 import types_pb2 as types
from benchmarks.fleet.content import FRAME_RATE_HZ, RATE_HZ, SIZES, STAGES
from benchmarks.fleet.discovery import ask, endpoints, redis
from benchmarks.fleet.endpoints import Fleet
from benchmarks.fleet.gateway import GATEWAY, cpu_s
from benchmarks.row import Row, row
from services.local.processes import Suite, free_ports, until_healthy

NUM_FULL, AT_ONCE = (10, 100, 300), 20
NUM_GATEWAYS, NUM_WORKERS = 4, 12
MAX_REFUSAL_S, MAX_AT_A_WORKER = 0.05, 2
NUM_LIVE, REFUSALS_HZ, SETTLE_S, SECONDS = 12, 10.0, 2.0, 20.0
MAX_DELAY = 1.1  # of the 99th percentile of blocks, beside refusals


@dataclass(frozen=True)
class Refusals:
    """Seconds of a refusal that comes alone, and of the slowest of AT_ONCE; CPU-ms of the gateway for each."""

    alone_s: float
    slowest_s: float
    cpu_ms: float


def rows() -> list[Row]:
    """Measure refusals at full levels of several sizes, and the spread of sessions of several gateways."""
    found = []
    for count in NUM_FULL:
        each = asyncio.run(refusals(count))
        note = f"the slowest of {AT_ONCE} at once {1e3 * each.slowest_s:.0f} ms, {each.cpu_ms:.2g} CPU-ms each"
        figure = f"fleet: refusal at {count} full workers"
        found.append(row(figure, 1e3 * each.alone_s, "ms", at_most=1e3 * MAX_REFUSAL_S, note=note))
    without_s, beside_s = asyncio.run(delays())
    figure = f"fleet: live blocks beside {REFUSALS_HZ:g} refusals a second, p99"
    alone_ms = 1e3 * without_s
    found.append(row(figure, 1e3 * beside_s, "ms late", at_most=MAX_DELAY * alone_ms, bound=alone_ms))
    most = asyncio.run(most_at_a_worker())
    figure = f"fleet: {NUM_WORKERS} sessions at once by {NUM_GATEWAYS} gateways over {NUM_WORKERS} workers"
    found.append(row(figure, most, "at a worker", at_most=MAX_AT_A_WORKER, bound=1))
    return found


@dataclass(frozen=True)
class Gateways:
    """Running gateways: HOST:PORT and process of each. workers: their fleet."""

    targets: list[str]
    processes: list[psutil.Process]
    workers: Fleet


@asynccontextmanager
async def gateways(count: int, workers: dict[str, int], **fleet: Any) -> AsyncGenerator[Gateways, None]:
    """Run gateways over stand-in workers, so many of each stage, while the body runs. fleet: fields of `Fleet`."""
    names = [f"{GATEWAY}-{number}" for number in range(count)]
    async with redis() as url, endpoints(url, workers, **fleet) as (served, _):
        targets = {name: f"127.0.0.1:{port}" for name, port in zip(names, free_ports(count), strict=True)}
        environment = {
            "AVATAR_REDIS_URL": url,
            "AVATAR_AUDIO": ",".join(served.targets["audio"]),
            "AVATAR_DENOISERS": ",".join(target for stage in STAGES[1:-1] for target in served.targets[stage]),
            "AVATAR_VAE": ",".join(served.targets["vae"]),
            "AVATAR_LOG_LEVEL": "WARNING",
        }
        with tempfile.TemporaryDirectory(prefix="avatar-bench-") as folder:
            async with Suite(Path(folder), url, targets) as suite:
                for name, target in targets.items():
                    program = (sys.executable, "-m", "services.gateway")
                    await suite.start(name, *program, **environment, AVATAR_LISTEN=target)
                await until_healthy(suite)
                processes = [psutil.Process(suite.processes[name].pid) for name in names]
                yield Gateways([*targets.values()], processes, served)


class Client:
    """A client with sessions to open at one gateway."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: Any = pb_grpc.AvatarServiceStub(channel)
        self._calls: list[Any] = []

    async def create(self, count: int) -> list[str]:
        """Return the ids of new sessions."""
        created = await self._stub.CreateReference(pb.CreateReferenceRequest(picture=b"any"))
        request = pb.CreateSessionRequest(reference_id=created.reference.id)
        return [(await self._stub.CreateSession(request)).session.id for _ in range(count)]

    async def open(self, session_id: str) -> Any:
        """Open a session's live stream, which stays open; return its call. Raises AioRpcError if it is refused."""
        audio = types.AudioFormat(encoding=types.SAMPLE_ENCODING_PCM16, rate_hz=RATE_HZ, num_channels=1)
        opening = pb.OpenAvatar(session_id=session_id, audio=audio, mode=pb.OpenAvatar.MODE_LIVE)
        call = self._stub.StreamAvatar()
        self._calls.append(call)
        await call.write(pb.StreamAvatarRequest(open=opening))
        await call.read()
        return call

    async def refused_s(self, session_id: str) -> float:
        """Return the seconds until a session's stream is refused."""
        started_s = time.monotonic()
        try:
            await self.open(session_id)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                return time.monotonic() - started_s
            raise
        raise RuntimeError("a stream opened where all workers are full")


async def refusals(num_full: int) -> Refusals:
    """Open sessions where all workers of the last level are full, one by one and at once."""
    workers = {**dict.fromkeys(STAGES, 1), STAGES[-2]: num_full}
    async with gateways(1, workers, limits={STAGES[-2]: 1}, full=[STAGES[-2]]) as started, AsyncExitStack() as stack:
        client = Client(await stack.enter_async_context(grpc.aio.insecure_channel(started.targets[0])))
        first, *others = await client.create(2 * AT_ONCE + 1)
        await client.refused_s(first)
        spent_s = cpu_s(started.processes[0])
        alone_s = [await client.refused_s(each) for each in others[:AT_ONCE]]
        at_once_s = await asyncio.gather(*(client.refused_s(each) for each in others[AT_ONCE:]))
        spent_s = cpu_s(started.processes[0]) - spent_s
    return Refusals(median(alone_s), max(at_once_s), 1e3 * spent_s / (2 * AT_ONCE))


async def delays(num_full: int = NUM_FULL[-1], seconds: float = SECONDS) -> tuple[float, float]:
    """Return by how much live blocks are late, in seconds, 99th percentile: without refusals, and beside them.

    The sessions are idle, and the workers of the last level full but for them.
    seconds: of each measurement.
    """
    workers = {**dict.fromkeys(STAGES, 1), STAGES[-2]: num_full + NUM_LIVE}
    full = {"limits": {STAGES[-2]: 1}, "full": [STAGES[-2]], "num_free": NUM_LIVE}
    async with gateways(1, workers, **full) as started, AsyncExitStack() as stack:
        client = Client(await stack.enter_async_context(grpc.aio.insecure_channel(started.targets[0])))
        *sessions, refused = await client.create(NUM_LIVE + 1)
        streams = [LiveFrames(await client.open(each)) for each in sessions]
        async with asyncio.TaskGroup() as tasks:
            receiving = [tasks.create_task(each.receive()) for each in streams]
            await asyncio.sleep(SETTLE_S)
            without_s, refusals = await _late_s(streams, seconds), tasks.create_task(_refuse_forever(client, refused))
            beside_s = await _late_s(streams, seconds)
            for task in (refusals, *receiving):
                task.cancel()
    return without_s, beside_s


class LiveFrames:
    """The first frames of a live stream's blocks.

    late_s: by how much each but the first came later than a block's duration after the one before it, in seconds. Not
    later than the earliest one: a late block moves those behind it back for ever.
    """

    def __init__(self, call: Any) -> None:
        self._call = call
        self._times_s: list[float] = []  # of arrival, less the frame's time in the video

    @property
    def late_s(self) -> list[float]:
        return [max(0.0, after - before) for before, after in pairwise(self._times_s)]

    async def receive(self) -> None:
        """Receive frames until the stream ends."""
        while (response := await self._call.read()) is not grpc.aio.EOF:
            # The stand-in sends a block's frames at once, so that the others are early by the time that they last.
            if response.HasField("frame") and response.frame.index % SIZES["tiny"].block_frames == 0:
                self._times_s.append(time.monotonic() - response.frame.index / FRAME_RATE_HZ)


async def _late_s(streams: list[LiveFrames], seconds: float) -> float:
    """Return the 99th percentile of the delays of the frames that come from now on."""
    counts = [len(each.late_s) for each in streams]
    await asyncio.sleep(seconds)
    late_s = [late for each, count in zip(streams, counts, strict=True) for late in each.late_s[count:]]
    return quantiles(late_s, n=100)[-1]


async def _refuse_forever(client: Client, session_id: str) -> None:
    while True:
        await client.refused_s(session_id)
        await asyncio.sleep(1 / REFUSALS_HZ)


async def most_at_a_worker() -> int:
    """Open sessions at all gateways at once. Return the number of streams at the fullest worker of the first level."""
    workers = {**dict.fromkeys(STAGES, 1), STAGES[1]: NUM_WORKERS}
    async with gateways(NUM_GATEWAYS, workers) as started, AsyncExitStack() as stack:
        clients = [Client(await stack.enter_async_context(grpc.aio.insecure_channel(each))) for each in started.targets]
        sessions = [(client, each) for client in clients for each in await client.create(NUM_WORKERS // NUM_GATEWAYS)]
        await asyncio.gather(*(client.open(each) for client, each in sessions))
        active = []
        for target in started.workers.targets[STAGES[1]]:
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(target))
            active.append((await ask(channel)).active)
    if sum(active) != NUM_WORKERS:
        raise RuntimeError(f"{sum(active)} of {NUM_WORKERS} sessions are open")
    return max(active)
