"""What a live conversation is like on this machine, over the public contract: a click in silence, and interrupts.

The services run in one process of their own and share one thread, so a level waits for the others: figures are the wall
clock's, and a busy machine shows in them.
"""

import asyncio
import os
import socket
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc.aio

from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import avatar_service_pb2_grpc as pb_grpc
from avatar.v1 import types_pb2 as types
from benchmarks.pipeline.figures import rank
from benchmarks.row import Row, row

RATE_HZ = 16000
PIECE = RATE_HZ // 25
CLICK = b"\xff\x3f" + bytes(2 * (PIECE - 1))
SILENCE = bytes(2 * PIECE)
TRIALS = 12
START_S = 120.0
PORTRAIT = Path(__file__).parents[1] / "assets/portrait.png"


def rows(checkpoint: Path) -> list[Row]:
    """Reaction to a click, acknowledgement of interrupts, sound against picture, and jitter of idle frames."""
    return asyncio.run(_measured(checkpoint))


async def _measured(checkpoint: Path) -> list[Row]:
    async with _gateway(checkpoint) as stub:
        told = await stub.GetCapabilities(pb.GetCapabilitiesRequest())
        client = await _Client.begin(stub)
        await client.idle(3.0)
        block = told.block_frames
        came_s = [at for frame, at in client.came if frame.index % block == 0]
        jitter_ms = [abs(b - a - block / told.video.frame_rate_hz) * 1e3 for a, b in pairwise(came_s)]
        reactions, acknowledged, held = [], [], []
        for trial in range(TRIALS):
            await client.idle(0.6 + 0.48 * trial / TRIALS)  # at every place in a block
            reactions.append(await client.click())
            acknowledged_s, held_s = await client.interrupt()
            acknowledged.append(acknowledged_s * 1e3)
            held.append(held_s)
        client.call.cancel()
    return [
        row("live: reaction to a click, p50", rank(reactions, 50), "s", at_most=told.reaction_s),
        row("live: reaction to a click, p95", rank(reactions, 95), "s", at_most=told.reaction_s),
        row("live: interrupt acknowledged, p50", rank(acknowledged, 50), "ms"),
        row("live: interrupt acknowledged, p99", rank(acknowledged, 99), "ms"),
        row("live: last frame holds after an interrupt, p50", rank(held, 50), "s", at_most=told.hold_s),
        row("live: last frame holds after an interrupt, p95", rank(held, 95), "s", at_most=told.hold_s),
        row("live: sound against picture, most", max(client.offsets_us, default=0) / 1e3, "ms", at_most=0.0),
        row("live: jitter of idle blocks, p50", rank(jitter_ms, 50), "ms"),
        row("live: jitter of idle blocks, p95", rank(jitter_ms, 95), "ms"),
    ]


class _Client:
    """A live stream that is read all the time."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.came: list[tuple[types.VideoFrame, float]] = []
        self.offsets_us: list[int] = []
        self._sound_us, self._interrupted_s = 0, 0.0
        self._spoke, self._interrupted = asyncio.Event(), asyncio.Event()

    @classmethod
    async def begin(cls, stub: "pb_grpc.AvatarServiceAsyncStub") -> "_Client":
        picture = PORTRAIT.read_bytes()
        reference = (await stub.CreateReference(pb.CreateReferenceRequest(picture=picture))).reference
        session = (await stub.CreateSession(pb.CreateSessionRequest(reference_id=reference.id))).session
        sound = types.AudioFormat(encoding=types.SAMPLE_ENCODING_PCM16, rate_hz=RATE_HZ, num_channels=1)
        client = cls(stub.StreamAvatar())
        mode = pb.OpenAvatar.MODE_LIVE
        opened = pb.OpenAvatar(session_id=session.id, audio=sound, mode=mode, return_audio=True)
        await client.call.write(pb.StreamAvatarRequest(open=opened))
        await client.call.read()
        return client

    async def idle(self, seconds: float) -> None:
        """Read while nothing is said."""
        await self._beside(asyncio.sleep(seconds))

    async def click(self) -> float:
        """Say a click, and silence as a microphone gives it; seconds from the click to the first frame of speech."""
        self._spoke.clear()
        started = time.monotonic()

        async def say() -> None:
            number = 0
            while not self._spoke.is_set():
                data = SILENCE if number else CLICK
                await self.call.write(pb.StreamAvatarRequest(audio=pb.AudioPiece(data=data)))
                number += 1
                await asyncio.sleep(max(0.0, started + number * PIECE / RATE_HZ - time.monotonic()))

        await self._beside(say())
        return next(at for frame, at in self.came if not frame.is_idle and at > started) - started

    async def interrupt(self) -> tuple[float, float]:
        """Interrupt; seconds until it is acknowledged, and from there until there are idle frames."""
        self._interrupted.clear()
        started = time.monotonic()
        await self.call.write(pb.StreamAvatarRequest(interrupt=pb.InterruptAvatar()))
        await self._beside(self._interrupted.wait())
        while self.came[-1][1] < self._interrupted_s:
            self._take(await self.call.read())
        return self._interrupted_s - started, self.came[-1][1] - self._interrupted_s

    async def _beside(self, doing: Any) -> None:
        """Read until something is done. A read that is cancelled ends the call, so one is always left to finish."""
        done = asyncio.ensure_future(doing)
        while not done.done():
            self._take(await self.call.read())
        await done

    def _take(self, response: Any) -> None:
        match response.WhichOneof("part"):
            case "audio":
                self._sound_us = response.audio.pts_us
            case "frame":
                frame = response.frame
                self.offsets_us.append(abs(frame.pts_us - self._sound_us))
                self.came.append((types.VideoFrame(index=frame.index, is_idle=frame.is_idle), time.monotonic()))
                if not frame.is_idle:
                    self._spoke.set()
            case "interrupted":
                self._interrupted_s = time.monotonic()
                self._interrupted.set()


@asynccontextmanager
async def _gateway(checkpoint: Path) -> "AsyncGenerator[pb_grpc.AvatarServiceAsyncStub, None]":
    """All services in a process of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{free.getsockname()[1]}"
    environ = {**os.environ, "AVATAR_LISTEN": target, "AVATAR_CHECKPOINT": str(checkpoint), "AVATAR_LOG_LEVEL": "ERROR"}
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "services", env=environ)
    try:
        async with grpc.aio.insecure_channel(target) as channel:
            async with asyncio.timeout(START_S):
                await channel.channel_ready()
            yield pb_grpc.AvatarServiceStub(channel)
    finally:
        process.terminate()
        await process.wait()
