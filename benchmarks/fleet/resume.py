"""Resuming a session at another gateway of a full cell, while the first one lives and another client waits for room.

Redis, a stand-in worker for each stage with capacity for one session, and two gateways, each a process.
"""

import asyncio
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc.aio

from avatar.aio import background
from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import avatar_service_pb2_grpc as pb_grpc
from avatar.v1 import types_pb2 as types
from benchmarks.pipeline.metrics import percentile
from benchmarks.row import Row, row
from benchmarks.standin.content import NUM_LEVELS, RATE_HZ
from services.local.processes import Suite, free_ports, start_redis, until_healthy

ROUNDS, LIMIT_S = 20, 1.0
STEP_S, SPEAK_S = 0.02, 0.5
GATEWAYS = ("gateway-0", "gateway-1")


def rows() -> list[Row]:
    """Measure the time from a client's `open` with `resume` to `opened`."""
    times_s = asyncio.run(_measured())
    figure = "fleet: resume at another gateway of a full cell"
    p50, p95 = (percentile(times_s, each) * 1e3 for each in (50, 95))
    return [
        row(f"{figure}, p50", p50, "ms"),
        row(f"{figure}, p95", p95, "ms"),
        row(f"{figure}, slowest of {ROUNDS}", max(times_s) * 1e3, "ms", at_most=LIMIT_S * 1e3),
    ]


async def _measured() -> list[float]:
    with tempfile.TemporaryDirectory(prefix="avatar-bench-") as folder:
        async with full_cell(Path(folder)) as suite:
            return await resume_times([suite.targets[name] for name in GATEWAYS], lambda call, _: call.cancel())


@asynccontextmanager
async def full_cell(folder: Path) -> AsyncGenerator[Suite, None]:
    """Run the processes while the body runs. folder: of their output."""
    levels = [f"denoiser-{level}" for level in range(NUM_LEVELS)]
    names = ["audio", *levels, "vae", *GATEWAYS]
    redis_port, *ports = free_ports(1 + len(names))
    targets = {name: f"127.0.0.1:{port}" for name, port in zip(names, ports, strict=True)}
    async with Suite(folder, f"redis://127.0.0.1:{redis_port}", targets) as suite:
        await start_redis(suite, redis_port)
        for name in ("audio", *levels, "vae"):
            stage, _, level = name.partition("-")
            flags = ["--listen", targets[name], "--step-s", str(STEP_S), "--capacity", "1", "--level", level or "0"]
            await suite.start(name, sys.executable, "-m", "benchmarks.standin", stage, *flags)
        workers = {"AVATAR_AUDIO": targets["audio"], "AVATAR_VAE": targets["vae"]}
        workers["AVATAR_DENOISERS"] = ",".join(targets[level] for level in levels)
        for name in GATEWAYS:
            own = {"AVATAR_LISTEN": targets[name], "AVATAR_REDIS_URL": suite.redis_url, **workers}
            await suite.start(name, sys.executable, "-m", "services.gateway", **own)
        await until_healthy(suite)
        yield suite


async def resume_times(
    targets: Sequence[str], cut: Callable[[Any, int], object], *, rounds: int = ROUNDS
) -> list[float]:
    """Return the seconds that each resume took. RuntimeError if a frame is missing, or comes again.

    targets: of the gateways, which take turns. cut: breaks a stream's connection, given its call and the number of its
    target. Raises the error of a resume that is refused.
    """
    times_s: list[float] = []
    async with grpc.aio.insecure_channel(targets[0]) as first, grpc.aio.insecure_channel(targets[1]) as second:
        stubs: list[Any] = [pb_grpc.AvatarServiceStub(each) for each in (first, second)]
        session_id, other_id = [await _new_session(stubs[0]) for _ in range(2)]
        call = await _open(stubs[0], session_id)
        async with background(_open_for_ever(stubs[1], other_id)):
            for number in range(rounds):
                until_s = time.monotonic() + SPEAK_S
                last = await _next_frame(call)
                while time.monotonic() < until_s:
                    last = await _next_frame(call)
                cut(call, number % 2)
                started_s = time.monotonic()
                call = await _open(stubs[(number + 1) % 2], session_id, resume=pb.ResumeAvatar(next_frame=last + 1))
                times_s.append(time.monotonic() - started_s)
                if (following := await _next_frame(call)) != last + 1:
                    raise RuntimeError(f"frame {following} came after frame {last}")
        call.cancel()
    return times_s


async def _new_session(stub: Any) -> str:
    reference = (await stub.CreateReference(pb.CreateReferenceRequest(picture=b"any"))).reference
    session_id: str = (await stub.CreateSession(pb.CreateSessionRequest(reference_id=reference.id))).session.id
    return session_id


async def _open(stub: Any, session_id: str, **fields: Any) -> Any:
    """Open a live stream; return its call, whose `opened` has arrived."""
    audio = types.AudioFormat(encoding=types.SAMPLE_ENCODING_PCM16, rate_hz=RATE_HZ, num_channels=1)
    opened = pb.OpenAvatar(session_id=session_id, audio=audio, mode=pb.OpenAvatar.MODE_LIVE, **fields)
    call = stub.StreamAvatar()
    await call.write(pb.StreamAvatarRequest(open=opened))
    await _read(call)
    return call


async def _open_for_ever(stub: Any, session_id: str) -> None:
    """Open a stream as soon as there is room, and keep it: it takes every slot that becomes free."""
    while True:
        with suppress(grpc.aio.AioRpcError, RuntimeError):
            call = await _open(stub, session_id)
            while True:
                await _read(call)


async def _next_frame(call: Any) -> int:
    while not (response := await _read(call)).HasField("frame"):
        pass
    number: int = response.frame.index
    return number


async def _read(call: Any) -> pb.StreamAvatarResponse:
    response = await call.read()
    if not isinstance(response, pb.StreamAvatarResponse):
        raise RuntimeError("the gateway ended the stream")
    return response
