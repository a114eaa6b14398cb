"""Opening streams at the sizes of the public 14B network: how many a second one Redis bears, and their CPU time.

Redis computes on one core: it bears what its own CPU time allows, whatever else this machine runs. Each session has a
portrait that no other one has open, so that its motion latents leave Redis: the worst case. `python -m
benchmarks.fleet.opening URL SECONDS` makes a gateway's calls to Redis for as many openings as it can, and prints how
many.
"""

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import grpc.aio
import psutil
from redis.asyncio import Redis

from avatar.store.redis import RedisHashes
from avatar.store.sessions import SessionStore
from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import avatar_service_pb2_grpc as pb_grpc
from avatar.v1 import types_pb2 as types
from avatar.worker.v1 import types_pb2
from benchmarks.fleet.content import FIRST_FRAME, FRAME_RATE_HZ, RATE_HZ, SIZES
from benchmarks.fleet.gateway import GATEWAY, cpu_s, running
from benchmarks.pipeline.processes import start_program
from benchmarks.row import Row, row
from services.local.processes import Suite, free_ports, start_redis, until_healthy

TARGET_PER_S = 200.0
# The motion latents are 19 latent frames, a block is 3; the sink is one.
SINK_BYTES = SIZES["14B"].latent_bytes // 3
MOTION_BYTES = 19 * SINK_BYTES
NUM_PORTRAITS = 32
PROCESSES, AT_A_TIME, SECONDS, LIMIT_S = 2, 4, 5.0, 60.0
NUM_GATEWAY_OPENINGS = 100
TTL_S = 600.0


@dataclass(frozen=True)
class Cost:
    """Of one opening: CPU-ms of the process that is measured, and bytes that Redis sends."""

    cpu_ms: float
    num_bytes: float


def rows() -> list[Row]:
    """Measure openings against Redis alone, and at a gateway over stand-in workers."""
    per_s, redis = asyncio.run(measure_redis())
    gateway = asyncio.run(measure_gateway())
    each = f"{redis.cpu_ms:.2g} CPU-ms and {redis.num_bytes / 1e6:.3g} MB each"
    redis_note = f"by its {each}; {per_s:.0f} ran beside their clients"
    gateway_note = f"{TARGET_PER_S:.0f} a second are {TARGET_PER_S * gateway.cpu_ms / 1e3:.2g} cores of gateways"
    return [
        row(
            "fleet: opens a second, 14B-sized, one Redis",
            1e3 / redis.cpu_ms,
            "1/s",
            at_least=TARGET_PER_S,
            note=redis_note,
        ),
        row("fleet: gateway per opening, 14B-sized", gateway.cpu_ms, "CPU-ms", note=gateway_note),
    ]


async def measure_redis(seconds: float = SECONDS) -> tuple[float, Cost]:
    """Return how many openings a second one Redis served, and its own cost of each. Only Redis and its clients run."""
    with tempfile.TemporaryDirectory(prefix="avatar-bench-") as folder:
        [port] = free_ports(1)
        async with Suite(Path(folder), f"redis://127.0.0.1:{port}", {}) as suite:
            await start_redis(suite, port)
            await until_healthy(suite)
            await _put_portraits(suite.redis_url)
            process = psutil.Process(suite.processes["redis"].pid)
            before_s, before_bytes = cpu_s(process), await _sent_bytes(suite.redis_url)
            module = "benchmarks.fleet.opening"
            clients = [await start_program("-m", module, suite.redis_url, str(seconds)) for _ in range(PROCESSES)]
            try:
                async with asyncio.timeout(LIMIT_S):
                    printed = [(await each.communicate())[0] for each in clients]
            finally:
                for each in clients:
                    if each.returncode is None:
                        each.kill()
            if not all(printed):
                raise RuntimeError("a client of Redis failed")
            rates = [json.loads(each) for each in printed]
            num = sum(each["num_openings"] for each in rates)
            cost = Cost(
                (cpu_s(process) - before_s) * 1e3 / num, (await _sent_bytes(suite.redis_url) - before_bytes) / num
            )
            return sum(each["num_openings"] / each["elapsed_s"] for each in rates), cost


async def measure_gateway(num_openings: int = NUM_GATEWAY_OPENINGS) -> Cost:
    """Return a gateway's cost of creating, opening and deleting a session, and the bytes that Redis sends for it."""
    async with running(SIZES["14B"], GATEWAY) as (suite, process):
        await _put_portraits(suite.redis_url)
        async with grpc.aio.insecure_channel(suite.targets[GATEWAY]) as channel, asyncio.timeout(LIMIT_S):
            stub: Any = pb_grpc.AvatarServiceStub(channel)
            portraits = cycle(range(NUM_PORTRAITS))

            async def open_some(count: int) -> None:
                for _ in range(count):
                    await _open_and_delete(stub, f"{next(portraits)}")

            await open_some(AT_A_TIME)
            before_s, before_bytes = cpu_s(process), await _sent_bytes(suite.redis_url)
            await asyncio.gather(*(open_some(num_openings // AT_A_TIME) for _ in range(AT_A_TIME)))
            num = num_openings // AT_A_TIME * AT_A_TIME
            num_bytes = (await _sent_bytes(suite.redis_url) - before_bytes) / num
            return Cost((cpu_s(process) - before_s) * 1e3 / num, num_bytes)


async def _open_and_delete(stub: Any, reference_id: str) -> None:
    session = (await stub.CreateSession(pb.CreateSessionRequest(reference_id=reference_id))).session
    audio = types.AudioFormat(encoding=types.SAMPLE_ENCODING_PCM16, rate_hz=RATE_HZ, num_channels=1)
    output = types.VideoOutput(encoding=types.VIDEO_ENCODING_JPEG)
    call = stub.StreamAvatar()
    opening = pb.OpenAvatar(session_id=session.id, audio=audio, output=output)
    await call.write(pb.StreamAvatarRequest(open=opening))
    if (await call.read()) is grpc.aio.EOF:
        raise RuntimeError("the gateway ended the stream")
    await stub.DeleteSession(pb.DeleteSessionRequest(session_id=session.id))
    call.cancel()


@asynccontextmanager
async def _store(redis_url: str) -> AsyncGenerator[SessionStore, None]:
    store = SessionStore(RedisHashes(redis_url))
    try:
        yield store
    finally:
        await store.aclose()


async def _put_portraits(redis_url: str) -> None:
    sizes = SIZES["14B"]
    motion, sink = (
        types_pb2.Tensor(dtype="uint8", shape=[size], data=bytes(size)) for size in (MOTION_BYTES, SINK_BYTES)
    )
    async with _store(redis_url) as store:
        for number in range(NUM_PORTRAITS):
            reference = types_pb2.Reference(
                id=f"{number}", width=720, height=400, frame_rate_hz=FRAME_RATE_HZ, block_frames=sizes.block_frames
            )
            reference.motion.CopyFrom(motion)
            reference.sink.CopyFrom(sink)
            await store.references.put(reference, TTL_S)


async def _sent_bytes(redis_url: str) -> int:
    async with Redis.from_url(redis_url) as client:
        return int((await client.info("stats"))["total_net_output_bytes"])


async def open_sessions(redis_url: str, seconds: float) -> int:
    """Create, open and delete sessions in the store, AT_A_TIME at a time, as a gateway does; return how many."""
    end_s, num_openings = time.monotonic() + seconds, 0
    portraits = cycle(range(NUM_PORTRAITS))
    async with _store(redis_url) as store:

        async def open_some() -> None:
            nonlocal num_openings
            while time.monotonic() < end_s:
                await _open_in_store(store, f"{next(portraits)}")
                num_openings += 1

        await asyncio.gather(*(open_some() for _ in range(AT_A_TIME)))
    return num_openings


async def _open_in_store(store: SessionStore, reference_id: str) -> None:
    reference = await store.references.get(reference_id)
    session = types_pb2.Session(id=f"{id(store)}-{time.monotonic_ns()}", reference_id=reference.id)
    await store.create(session, types_pb2.Conditions(), types_pb2.Position(next_frame=FIRST_FRAME, ttl_s=TTL_S))
    claim = store.claim(session.id)
    record = await store.acquire(claim)
    latents = await store.references.latents(record.session.reference_id)
    assert latents
    await claim.commit(record.position)
    await store.status(session.id)
    await store.delete(session.id)
    await claim.release()


def main() -> None:
    redis_url, seconds = sys.argv[1], float(sys.argv[2])
    started_s = time.monotonic()
    num_openings = asyncio.run(open_sessions(redis_url, seconds))
    print(json.dumps({"num_openings": num_openings, "elapsed_s": time.monotonic() - started_s}))


if __name__ == "__main__":
    main()
