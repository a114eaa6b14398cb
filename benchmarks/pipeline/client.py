"""Clients of a gateway, in a process of their own: `python -m benchmarks.pipeline.client`, a Job in and a Report out.

Both are JSON, on standard input and output. The audio is predetermined, and the output is checked byte for byte: the
returned audio equals what was sent, in order, and each picture is the one that its audio gives on the only correct path
through all stages.
"""

import asyncio
import json
import math
import sys
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import grpc.aio
import numpy as np

from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import avatar_service_pb2_grpc as pb_grpc
from avatar.v1 import types_pb2 as types
from benchmarks.pipeline.processes import cpu_seconds, start_program
from benchmarks.standin import content

# Live sessions send so many pieces per block.
NUM_PIECES = 4
# A prime number of samples, so that no two blocks of a session have equal audio.
VOICE_BYTES = 2 * 500_009
START_S = 1.0
PORTRAIT = Path(__file__).parents[2] / "assets/portrait.png"


@dataclass(frozen=True)
class Job:
    """Work for clients.

    pace: `alone`: send a block when the previous one has arrived; `full`: offline, as fast as possible; `live`: in real
        time, with the sessions' starts spread evenly over a block. num_blocks: blocks that each session speaks.
    pids: processes whose CPU time is counted in addition to the clients' own.
    limit_s: at `full` pace, seconds after which the audio ends. is_checked: whether the stages are stand-ins, whose
        pictures are known. block_latents, num_levels: of the suite's `Content`.
    """

    target: str
    pace: str
    num_blocks: int
    num_sessions: int = 1
    pids: list[int] = field(default_factory=list)
    limit_s: float = math.inf
    is_checked: bool = True
    block_latents: int = content.PUBLIC.block_latents
    num_levels: int = content.PUBLIC.num_levels

    @property
    def content(self) -> content.Content:
        return content.Content(self.block_latents, self.num_levels)


class Arrival(NamedTuple):
    """A message of frames. first_frame: number of the first. at_s: time on the monotonic clock."""

    first_frame: int
    num_frames: int
    at_s: float
    is_idle: bool


@dataclass
class SessionReport:
    """Output of one session.

    sent_s: time at which each block was sent; empty for `live`, where blocks are sent in pieces.
    wrong: pictures or audio that differ from the expected, or speech that never arrived.
    refused: the gateway's error, empty if there was none.
    """

    arrivals: list[Arrival] = field(default_factory=list)
    sent_s: list[float] = field(default_factory=list)
    wrong: int = 0
    refused: str = ""

    @property
    def arrived_s(self) -> list[float]:
        """Arrival times."""
        return [each.at_s for each in self.arrivals]


@dataclass
class Report:
    """Output of a job. cpu_s: CPU time of its pids and the clients while all streams were open."""

    sessions: list[SessionReport]
    cpu_s: float = 0.0


class Voice:
    """A session's endless audio."""

    def __init__(self, session: int) -> None:
        samples = np.random.default_rng(session).integers(1, 256, VOICE_BYTES, dtype=np.uint8)
        self._data = samples.tobytes()  # without zeros, which would be silence

    def at(self, start: int, size: int) -> bytes:
        start %= VOICE_BYTES
        data = self._data[start : start + size]
        return data if len(data) == size else data + self.at(0, size - len(data))


class Client:
    """One session's stream."""

    def __init__(self, stub: Any, number: int, job: Job) -> None:
        self.report = SessionReport()
        self.job = job
        self._stub = stub
        self._voice = Voice(number)
        self._num_sent = 0
        self._audio = b""
        self._num_returned = 0

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

    async def send(self, size: int) -> None:
        """Send the next `size` bytes of audio."""
        data = self._voice.at(self._num_sent, size)
        self._num_sent += size
        await self._call.write(pb.StreamAvatarRequest(audio=pb.AudioPiece(data=data)))

    async def close(self) -> None:
        await self._call.write(pb.StreamAvatarRequest(close=pb.CloseAvatar()))

    async def frames(self) -> AsyncGenerator[types.VideoFrame, None]:
        """Yield all messages of frames, recorded and checked."""
        while (response := await self._call.read()) is not grpc.aio.EOF:
            match response.WhichOneof("part"):
                case "audio":
                    self._audio = response.audio.data
                case "frame":
                    frame = response.frame
                    arrival = Arrival(frame.index, frame.num_frames, time.monotonic(), frame.is_idle)
                    self.report.arrivals.append(arrival)
                    self.report.wrong += self.job.is_checked and not self._is_correct(frame)
                    yield frame
                case "closed":
                    self.report.wrong += self.job.is_checked and self._num_returned != self._num_sent
                    return

    def _is_correct(self, frame: types.VideoFrame) -> bool:
        """Return whether the audio is the next that was sent, padded if late, and the picture belongs to it."""
        audio = self._audio
        made = self.job.content
        if (missing := made.block_bytes() - len(audio)) > 0:  # without the audio of frames that are not shown
            audio = (bytes(missing) if frame.is_idle else self._voice.at(self._num_returned, missing)) + audio
        spoken = audio.rstrip(b"\0")
        is_next = self._voice.at(self._num_returned, len(spoken)) == spoken and frame.is_idle != bool(spoken)
        self._num_returned += len(spoken)
        return is_next and content.picture_in(frame.data) == made.expected_picture(audio)


async def alone(client: Client) -> None:
    """Send a block, wait for its frames, send the next."""
    frames = client.frames()
    for _ in range(client.job.num_blocks):
        client.report.sent_s.append(time.monotonic())
        await client.send(client.job.content.block_bytes())
        await anext(frames)
    await client.close()
    async for _ in frames:
        pass


async def full(client: Client) -> None:
    """Send as fast as the gateway accepts."""

    async def speak() -> None:
        until = time.monotonic() + client.job.limit_s
        while len(client.report.sent_s) < client.job.num_blocks and time.monotonic() < until:
            client.report.sent_s.append(time.monotonic())
            await client.send(client.job.content.block_bytes())
        await client.close()

    await _while_speaking(client, speak)


async def live(client: Client) -> None:
    """Send in real time, like a microphone."""

    async def speak() -> None:
        started, made = time.monotonic(), client.job.content
        for number in range(1, NUM_PIECES * client.job.num_blocks + 1):
            await asyncio.sleep(max(0.0, started + number * made.block_s / NUM_PIECES - time.monotonic()))
            await client.send(made.block_bytes() // NUM_PIECES)
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


async def run_job(job: Job) -> Report:
    """Run a job's sessions in this process."""
    options = [("grpc.max_receive_message_length", 16 << 20)]
    async with grpc.aio.insecure_channel(job.target, options=options) as channel:
        clients = [Client(pb_grpc.AvatarServiceStub(channel), n, job) for n in range(job.num_sessions)]
        start = time.monotonic() + (START_S if job.pace == "live" else 0.0)
        apart_s = job.content.block_s / job.num_sessions
        cpu_s: list[float] = []

        async def run_session(number: int, client: Client) -> None:
            try:
                await asyncio.sleep(max(0.0, start + number * apart_s - time.monotonic()))
                await client.open()
                cpu_s.append(cpu_seconds(job.pids))
                await PACES[job.pace](client)
            except grpc.aio.AioRpcError as error:
                client.report.refused = f"{error.code().name}: {error.details()}"

        async with asyncio.TaskGroup() as tasks:
            for number, client in enumerate(clients):
                tasks.create_task(run_session(number, client))
        return Report([client.report for client in clients], cpu_seconds(job.pids) - max(cpu_s, default=0.0))


async def run_clients(job: Job, limit_s: float) -> Report:
    """Run a job in a process of its own. Raises TimeoutError if it takes longer than `limit_s`."""
    process = await start_program("-m", "benchmarks.pipeline.client")
    try:
        async with asyncio.timeout(limit_s):
            output, _ = await process.communicate(json.dumps(asdict(job)).encode())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise RuntimeError(f"the clients ended with {process.returncode}")
    report = json.loads(output)
    sessions = [
        SessionReport(**{**each, "arrivals": [Arrival(*arrival) for arrival in each["arrivals"]]})
        for each in report["sessions"]
    ]
    return Report(sessions, report["cpu_s"])


def main() -> None:
    job = Job(**json.load(sys.stdin))
    json.dump(asdict(asyncio.run(run_job(job))), sys.stdout)


if __name__ == "__main__":
    main()
