"""Latency of a live stream on this machine, over the public contract: interrupts, and the rhythm of idle frames.

The services run in one process of their own and share one device thread, so levels wait for each other. Values are wall
time and vary with the machine's load.
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
from benchmarks.pipeline.metrics import TooSlowError, percentile
from benchmarks.row import Row, row

RATE_HZ = 16000
PIECE = RATE_HZ // 25
CLICK = b"\xff\x3f" + bytes(2 * (PIECE - 1))
SILENCE = bytes(2 * PIECE)
# 2 s.
SENTENCE_PIECES = 50
TRIALS = 12
START_S, LIMIT_S = 120.0, 180.0
PORTRAIT = Path(__file__).parents[1] / "assets/portrait.png"


def rows(checkpoint: Path) -> list[Row]:
    """Measure acknowledgement of interrupts, audio-video offset, and jitter of idle frames."""
    return asyncio.run(_measured(checkpoint))


async def _measured(checkpoint: Path) -> list[Row]:
    async with all_services(checkpoint) as stub, asyncio.timeout(LIMIT_S):
        limits = await stub.GetCapabilities(pb.GetCapabilitiesRequest())
        client = await LiveClient.open(stub)
        await client.idle(3.0)
        block, block_s = limits.block_frames, limits.block_frames / limits.video.frame_rate_hz
        arrived_s = [at for frame, at in client.arrivals if frame.index % block == 0]
        jitter_ms = [abs(b - a - block_s) * 1e3 for a, b in pairwise(arrived_s)]
        acknowledged, held = [], []
        for trial in range(TRIALS):
            await client.idle(0.6 + block_s * trial / TRIALS)  # at different positions within a block
            await client.click()
            acknowledged_s, held_s = await client.interrupt()
            acknowledged.append(acknowledged_s * 1e3)
            held.append(held_s)
        client.call.cancel()
    return [
        row("live: interrupt acknowledged, p50", percentile(acknowledged, 50), "ms"),
        row("live: interrupt acknowledged, p99", percentile(acknowledged, 99), "ms"),
        row("live: last frame holds after an interrupt, p50", percentile(held, 50), "s", at_most=limits.hold_s or None),
        row("live: last frame holds after an interrupt, p95", percentile(held, 95), "s", at_most=limits.hold_s or None),
        row("live: audio-video offset, largest", max(client.offsets_us, default=0) / 1e3, "ms", at_most=0.0),
        row("live: jitter of idle blocks, p50", percentile(jitter_ms, 50), "ms"),
        row("live: jitter of idle blocks, p95", percentile(jitter_ms, 95), "ms"),
    ]


class LiveClient:
    """A live stream that is read continuously."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.arrivals: list[tuple[types.VideoFrame, float]] = []
        self.offsets_us: list[int] = []
        self._audio_us, self._interrupted_s = 0, 0.0
        self._has_spoken, self._interrupted = asyncio.Event(), asyncio.Event()

    @classmethod
    async def open(cls, stub: "pb_grpc.AvatarServiceAsyncStub") -> "LiveClient":
        picture = PORTRAIT.read_bytes()
        reference = (await stub.CreateReference(pb.CreateReferenceRequest(picture=picture))).reference
        session = (await stub.CreateSession(pb.CreateSessionRequest(reference_id=reference.id))).session
        audio = types.AudioFormat(encoding=types.SAMPLE_ENCODING_PCM16, rate_hz=RATE_HZ, num_channels=1)
        client = cls(stub.StreamAvatar())
        mode = pb.OpenAvatar.MODE_LIVE
        opened = pb.OpenAvatar(session_id=session.id, audio=audio, mode=mode, return_audio=True)
        await client.call.write(pb.StreamAvatarRequest(open=opened))
        await client.call.read()
        return client

    async def idle(self, seconds: float) -> None:
        """Read without sending audio."""
        await self._read_during(asyncio.sleep(seconds))

    async def click(self) -> float:
        """Send a click and silence in real time; return the seconds from the click to the first frame of speech."""
        self._has_spoken.clear()
        started = time.monotonic()

        async def speak() -> None:
            number = 0
            while not self._has_spoken.is_set():
                data = SILENCE if number else CLICK
                await self.call.write(pb.StreamAvatarRequest(audio=pb.AudioPiece(data=data)))
                number += 1
                await asyncio.sleep(max(0.0, started + number * PIECE / RATE_HZ - time.monotonic()))

        await self._read_during(speak())
        return self._first_speech_s(started)

    async def sentence(self) -> float:
        """Send a sentence at once; return the seconds from there to the first frame of speech."""
        self._has_spoken.clear()
        started = time.monotonic()

        async def speak() -> None:
            for _ in range(SENTENCE_PIECES):
                await self.call.write(pb.StreamAvatarRequest(audio=pb.AudioPiece(data=CLICK)))
            await self.call.write(pb.StreamAvatarRequest(end_turn=pb.EndTurn()))
            await self._has_spoken.wait()

        await self._read_during(speak())
        return self._first_speech_s(started)

    async def say(self, text: str) -> float:
        """Send a text; return the seconds from there to the first frame of its speech."""
        self._has_spoken.clear()
        started = time.monotonic()

        async def speak() -> None:
            await self.call.write(pb.StreamAvatarRequest(say=pb.SayText(text=text)))
            await self.call.write(pb.StreamAvatarRequest(end_turn=pb.EndTurn()))
            await self._has_spoken.wait()

        await self._read_during(speak())
        return self._first_speech_s(started)

    def _first_speech_s(self, started: float) -> float:
        """Return the seconds until the first frame of speech after a time."""
        return next(at for frame, at in self.arrivals if not frame.is_idle and at > started) - started

    async def interrupt(self) -> tuple[float, float]:
        """Interrupt; return the seconds until the acknowledgement, and from there until the first idle frame."""
        self._interrupted.clear()
        started = time.monotonic()
        await self.call.write(pb.StreamAvatarRequest(interrupt=pb.InterruptAvatar()))
        await self._read_during(self._interrupted.wait())
        while not self.arrivals or self.arrivals[-1][1] < self._interrupted_s:
            await self._read()
        return self._interrupted_s - started, self.arrivals[-1][1] - self._interrupted_s

    async def _read_during(self, activity: Any) -> None:
        """Read until an activity has finished. A cancelled read ends the call, so each read runs to its end."""
        done = asyncio.ensure_future(activity)
        try:
            while not done.done():
                await self._read()
            await done
        finally:
            done.cancel()

    async def _read(self) -> None:
        response = await self.call.read()
        if response is grpc.aio.EOF:
            raise TooSlowError("the gateway ended the stream")
        self._take(response)

    def _take(self, response: Any) -> None:
        match response.WhichOneof("part"):
            case "audio":
                self._audio_us = response.audio.pts_us
            case "frame":
                frame = response.frame
                self.offsets_us.append(abs(frame.pts_us - self._audio_us))
                self.arrivals.append((types.VideoFrame(index=frame.index, is_idle=frame.is_idle), time.monotonic()))
                if not frame.is_idle:
                    self._has_spoken.set()
            case "interrupted":
                self._interrupted_s = time.monotonic()
                self._interrupted.set()


@asynccontextmanager
async def all_services(checkpoint: Path, **environment: str) -> "AsyncGenerator[pb_grpc.AvatarServiceAsyncStub, None]":
    """Run all services in a process of their own. environment: further variables."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{free.getsockname()[1]}"
    environ = {**os.environ, "AVATAR_LISTEN": target, "AVATAR_CHECKPOINT": str(checkpoint), "AVATAR_LOG_LEVEL": "ERROR"}
    environ |= environment
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "services", env=environ)
    try:
        async with grpc.aio.insecure_channel(target) as channel:
            async with asyncio.timeout(START_S):
                await channel.channel_ready()
            yield pb_grpc.AvatarServiceStub(channel)
    finally:
        process.terminate()
        await process.wait()
