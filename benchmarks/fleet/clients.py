"""Live clients that speak in real time, all in one process: `python -m benchmarks.fleet.clients` reads a `Job` as JSON.

Prints a line once every client has received its first frame, speaks for the job's time, and prints a `Report`.
"""

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import grpc.aio

from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import avatar_service_pb2_grpc as pb_grpc
from avatar.v1 import types_pb2 as types
from benchmarks.fleet.content import RATE_HZ, Sizes

PIECES = 4  # in which a block's audio is sent


@dataclass(frozen=True)
class Job:
    """target: of the gateway. seconds: to speak for, once all clients have frames. takes_chunks: of `VideoOutput`."""

    target: str
    sizes: dict[str, int]
    num_sessions: int
    seconds: float
    takes_chunks: bool = True


@dataclass
class Report:
    """num_frames: that all clients received. num_wrong: frames out of order, or of the wrong size."""

    num_frames: int = 0
    num_wrong: int = 0


class Client:
    """One session's stream. has_frames: set with its first frame."""

    def __init__(self, stub: Any, job: Job, report: Report) -> None:
        self.has_frames = asyncio.Event()
        self._stub, self._job, self._report = stub, job, report
        self._sizes = Sizes(**job.sizes)

    async def open(self, reference_id: str) -> None:
        """Open a stream of a new session."""
        session = (await self._stub.CreateSession(pb.CreateSessionRequest(reference_id=reference_id))).session
        opening = pb.OpenAvatar(
            session_id=session.id,
            audio=types.AudioFormat(encoding=types.SAMPLE_ENCODING_PCM16, rate_hz=RATE_HZ, num_channels=1),
            mode=pb.OpenAvatar.MODE_LIVE,
            output=types.VideoOutput(encoding=types.VIDEO_ENCODING_JPEG, takes_chunks=self._job.takes_chunks),
        )
        self._call = self._stub.StreamAvatar()
        await self._call.write(pb.StreamAvatarRequest(open=opening))
        if (await self._call.read()) is grpc.aio.EOF:
            raise RuntimeError("the gateway ended the stream")

    async def speak(self, start_s: float, until: asyncio.Event) -> None:
        """Send audio in real time, from `start_s` of the monotonic clock on, until the event is set; then close."""
        piece = pb.StreamAvatarRequest(audio=pb.AudioPiece(data=b"\1" * (self._sizes.block_bytes // PIECES)))
        number = 0
        while not until.is_set():
            number += 1
            await asyncio.sleep(max(0.0, start_s + number * self._sizes.block_s / PIECES - time.monotonic()))
            await self._call.write(piece)
        await self._call.write(pb.StreamAvatarRequest(close=pb.CloseAvatar()))

    async def receive(self) -> None:
        """Receive frames until the stream ends; count them, and those that are wrong."""
        expected: int | None = None
        while (response := await self._call.read()) is not grpc.aio.EOF:
            part = response.WhichOneof("part")
            for frame in [response.frame] if part == "frame" else response.chunk.frames:
                is_next = expected is None or frame.index == expected
                expected = frame.index + 1
                self._report.num_frames += 1
                self._report.num_wrong += not is_next or len(frame.data) != self._sizes.frame_bytes
                self.has_frames.set()


async def run(job: Job) -> Report:
    """Run a job in this process."""
    report, enough = Report(), asyncio.Event()
    async with grpc.aio.insecure_channel(job.target) as channel:
        stub: Any = pb_grpc.AvatarServiceStub(channel)
        created = await stub.CreateReference(pb.CreateReferenceRequest(picture=b"any"))
        clients = [Client(stub, job, report) for _ in range(job.num_sessions)]
        async with asyncio.TaskGroup() as tasks:
            for client in clients:
                await client.open(created.reference.id)
            start_s = time.monotonic()
            for number, client in enumerate(clients):
                offset_s = number * Sizes(**job.sizes).block_s / job.num_sessions
                tasks.create_task(client.speak(start_s + offset_s, enough))
                tasks.create_task(client.receive())
            for client in clients:
                await client.has_frames.wait()
            print("ready", flush=True)
            report.num_frames = 0
            await asyncio.sleep(job.seconds)
            enough.set()
    return report


def main() -> None:
    job = Job(**json.loads(sys.stdin.readline()))
    print(json.dumps(asdict(asyncio.run(run(job)))))


if __name__ == "__main__":
    main()
