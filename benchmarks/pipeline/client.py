"""Clients of a gateway, in a process of their own: `python -m benchmarks.pipeline.client`, a Job in and a Report out.

Both are JSON, on standard input and output. Sound is given, and what comes back is checked, byte for byte: the sound is
what was sent, in order, and each picture is what its sound becomes on the one right way through all stages.
"""

import asyncio
import json
import math
import sys
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np

from avatar.types import BLOCK_S
from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import avatar_service_pb2_grpc as pb_grpc
from avatar.v1 import types_pb2 as types
from benchmarks.pipeline.processes import cpu_seconds
from benchmarks.standin import content

# Of sound, in live sessions: four pieces a block.
PIECE_BYTES = content.SOUND_BYTES // 4
PIECE_S = BLOCK_S / 4
# A prime number of samples, so that no two blocks of a session sound alike.
VOICE_BYTES = 2 * 500_009
START_S = 1.0
PORTRAIT = Path(__file__).parents[2] / "assets/portrait.png"


@dataclass(frozen=True)
class Job:
    """What clients are to do.

    pace: `alone`: a block is sent when the one before has come; `full`: offline, as fast as it goes; `live`: in real
        time, sessions begun evenly over a block. num_blocks: that each session speaks.
    pids: processes whose time of the processor is counted, beside the clients' own.
    limit_s: at `full` pace, seconds after which no more is said. is_checked: stages stand in, so pictures are known.
    """

    target: str
    pace: str
    num_blocks: int
    num_sessions: int = 1
    pids: list[int] = field(default_factory=list)
    limit_s: float = math.inf
    is_checked: bool = True


@dataclass
class Heard:
    """What came to one session.

    arrivals: number of the first frame of each message, how many it holds, seconds of the monotonic clock, whether
        nobody speaks. sent_s: when each block was sent; not where it comes in pieces (`live`).
    wrong: pictures or sound that are not what they should be, or speech that never came.
    refused: what the gateway ended the stream with.
    """

    arrivals: list[tuple[int, int, float, bool]] = field(default_factory=list)
    sent_s: list[float] = field(default_factory=list)
    wrong: int = 0
    refused: str = ""


@dataclass
class Report:
    """What came of a job. cpu_s: time of the processor that its pids and the clients had with all streams open."""

    sessions: list[Heard]
    cpu_s: float = 0.0


class Voice:
    """A session's sound, without end."""

    def __init__(self, session: int) -> None:
        loud = np.random.default_rng(session).integers(1, 256, VOICE_BYTES, dtype=np.uint8)
        self._data = loud.tobytes()  # without a zero, which would be silence

    def at(self, start: int, size: int) -> bytes:
        start %= VOICE_BYTES
        data = self._data[start : start + size]
        return data if len(data) == size else data + self.at(0, size - len(data))


class Client:
    """One session's stream."""

    def __init__(self, stub: Any, number: int, job: Job) -> None:
        self.heard = Heard()
        self.job = job
        self._stub = stub
        self._voice = Voice(number)
        self._said = 0
        self._sound = b""
        self._place = 0

    async def open(self) -> None:
        """Open a stream of a new session."""
        reference = (
            await self._stub.CreateReference(pb.CreateReferenceRequest(picture=PORTRAIT.read_bytes()))
        ).reference
        session = (await self._stub.CreateSession(pb.CreateSessionRequest(reference_id=reference.id))).session
        mode = pb.OpenAvatar.MODE_LIVE if self.job.pace == "live" else pb.OpenAvatar.MODE_OFFLINE
        opening = pb.OpenAvatar(
            session_id=session.id,
            audio=types.AudioFormat(encoding=types.SAMPLE_ENCODING_PCM16, rate_hz=content.RATE_HZ, num_channels=1),
            mode=mode,
            output=types.VideoOutput(encoding=types.VIDEO_ENCODING_FMP4),
            return_audio=True,
        )
        self._call = self._stub.StreamAvatar()
        await self._call.write(pb.StreamAvatarRequest(open=opening))
        if (await self._call.read()) is grpc.aio.EOF:
            raise RuntimeError("the gateway ended the stream")

    async def say(self, size: int) -> None:
        """Say the next bytes."""
        data = self._voice.at(self._said, size)
        self._said += size
        await self._call.write(pb.StreamAvatarRequest(audio=pb.AudioPiece(data=data)))

    async def close(self) -> None:
        await self._call.write(pb.StreamAvatarRequest(close=pb.CloseAvatar()))

    async def frames(self) -> AsyncGenerator[types.VideoFrame, None]:
        """What comes, noted and checked, until all has."""
        while (response := await self._call.read()) is not grpc.aio.EOF:
            match response.WhichOneof("part"):
                case "audio":
                    self._sound = response.audio.data
                case "frame":
                    frame = response.frame
                    self.heard.arrivals.append((frame.index, frame.num_frames, time.monotonic(), frame.is_idle))
                    self.heard.wrong += self.job.is_checked and not self._is_right(frame)
                    yield frame
                case "closed":
                    self.heard.wrong += self.job.is_checked and self._place != self._said
                    return

    def _is_right(self, frame: types.VideoFrame) -> bool:
        """Whether the sound is what was said next, with silence behind what came late, and the picture is its own."""
        sound = self._sound
        if len(sound) < content.SOUND_BYTES:  # the sound of frames that are not shown
            missing = content.SOUND_BYTES - len(sound)
            sound = (bytes(missing) if frame.is_idle else self._voice.at(self._place, missing)) + sound
        spoken = sound.rstrip(b"\0")
        is_next = self._voice.at(self._place, len(spoken)) == spoken and frame.is_idle != bool(spoken)
        self._place += len(spoken)
        return is_next and content.picture_of(frame.data) == content.expected(sound)


async def alone(client: Client) -> None:
    """Say a block, wait for its frames, say the next."""
    frames = client.frames()
    for _ in range(client.job.num_blocks):
        client.heard.sent_s.append(time.monotonic())
        await client.say(content.SOUND_BYTES)
        await anext(frames)
    await client.close()
    async for _ in frames:
        pass


async def full(client: Client) -> None:
    """Say as much as is taken."""

    async def speak() -> None:
        until = time.monotonic() + client.job.limit_s
        while len(client.heard.sent_s) < client.job.num_blocks and time.monotonic() < until:
            client.heard.sent_s.append(time.monotonic())
            await client.say(content.SOUND_BYTES)
        await client.close()

    await _while_speaking(client, speak)


async def live(client: Client) -> None:
    """Say as a microphone does."""

    async def speak() -> None:
        began = time.monotonic()
        for number in range(1, 4 * client.job.num_blocks + 1):
            await asyncio.sleep(max(0.0, began + number * PIECE_S - time.monotonic()))
            await client.say(PIECE_BYTES)
        await client.close()

    await _while_speaking(client, speak)


async def _while_speaking(client: Client, speak: Callable[[], Any]) -> None:
    speaking = asyncio.ensure_future(speak())
    try:
        async for _ in client.frames():
            pass
        await speaking
    finally:
        speaking.cancel()


PACES = {"alone": alone, "full": full, "live": live}


async def work(job: Job) -> Report:
    """Do a job."""
    options = [("grpc.max_receive_message_length", 16 << 20)]
    async with grpc.aio.insecure_channel(job.target, options=options) as channel:
        clients = [Client(pb_grpc.AvatarServiceStub(channel), n, job) for n in range(job.num_sessions)]
        began = time.monotonic() + (START_S if job.pace == "live" else 0.0)
        cpu_s: list[float] = []

        async def converse(number: int, client: Client) -> None:
            try:
                await asyncio.sleep(max(0.0, began + number * BLOCK_S / job.num_sessions - time.monotonic()))
                await client.open()
                cpu_s.append(cpu_seconds(job.pids))
                await PACES[job.pace](client)
            except grpc.aio.AioRpcError as error:
                client.heard.refused = f"{error.code().name}: {error.details()}"

        async with asyncio.TaskGroup() as tasks:
            for number, client in enumerate(clients):
                tasks.create_task(converse(number, client))
        return Report([client.heard for client in clients], cpu_seconds(job.pids) - max(cpu_s, default=0.0))


def main() -> None:
    job = Job(**json.load(sys.stdin))
    json.dump(asdict(asyncio.run(work(job))), sys.stdout)


if __name__ == "__main__":
    main()
