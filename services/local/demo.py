"""The demo: the whole suite as processes, and a product team's client that makes a video with it.

    python -m services.local.demo [--speech speech.wav] [--portrait face.png] [--out out]

Writes OUT/demo.mp4 and OUT/demo.json, and prints what it measured. AVATAR_REDIS_URL names a Redis server to use; one of
its own is started without it.
"""

import argparse
import asyncio
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Coroutine
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import grpc.aio
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from avatar.media import read_audio, write_mp4
from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import avatar_service_pb2_grpc as pb_grpc
from avatar.v1 import types_pb2 as types
from services.local.launch import ROOT, Suite, launched

PIECE_S = 0.04
MAX_MESSAGE_BYTES = 16 << 20


@dataclass(frozen=True)
class StageFigures:
    """What one stage did: blocks, share of the time it was computing, and seconds a block."""

    stage: str
    num_blocks: int
    busy_share: float
    mean_step_s: float


@dataclass(frozen=True)
class Figures:
    """What the demo measured. Times in seconds; the clock starts with the first piece of sound."""

    num_frames: int
    first_frame: int
    frame_rate_hz: int
    video_s: float
    time_to_first_frame_s: float
    total_s: float
    blocks_per_s: float
    frames_sha256: str
    stages: list[StageFigures]


Call: TypeAlias = "grpc.aio.StreamStreamCall[pb.StreamAvatarRequest, pb.StreamAvatarResponse]"
Sound: TypeAlias = NDArray[np.float32]
Made: TypeAlias = tuple[list[NDArray[np.uint8]], Figures]


async def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m services.local.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--speech", type=Path, default=ROOT / "assets/speech.wav", help="speech to speak")
    parser.add_argument("--portrait", type=Path, default=ROOT / "assets/portrait.png", help="who speaks")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "models/tiny", help="folder of the models")
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="folder to write to")
    parser.add_argument("--seed", type=int, default=420)
    flags = parser.parse_args()
    samples, rate_hz = read_audio(flags.speech)
    picture = flags.portrait.read_bytes()
    print(f"starting Redis, audio, four denoisers, vae and gateway; their output is in {flags.out / 'logs'}")
    async with launched(flags.checkpoint, flags.out / "logs", redis_url=os.environ.get("AVATAR_REDIS_URL")) as suite:
        frames, figures = await _unless_one_ends(suite, speak(suite.gateway, picture, samples, rate_hz, flags.seed))
    write_mp4(flags.out / "demo.mp4", frames, figures.frame_rate_hz, figures.first_frame, samples, rate_hz)
    (flags.out / "demo.json").write_text(json.dumps(asdict(figures), indent=2) + "\n")
    print(table(figures))
    print(f"wrote {flags.out / 'demo.mp4'} and {flags.out / 'demo.json'}")
    print("six more people to choose from: make demo PORTRAIT=assets/portraits/1.png ... 6.png")


async def _unless_one_ends(suite: Suite, client: Coroutine[Any, Any, Made]) -> Made:
    """What the client makes. RuntimeError if a process of the suite ends before."""
    making, ending = asyncio.ensure_future(client), asyncio.ensure_future(suite.first_to_end())
    try:
        await asyncio.wait({making, ending}, return_when=asyncio.FIRST_COMPLETED)
        if ending.done() and not (making.done() and not making.exception()):
            raise RuntimeError(f"{ending.result()} ended; see {suite.log_of(ending.result())}")
        return making.result()
    finally:
        making.cancel()
        ending.cancel()
        await asyncio.wait({making, ending})


async def speak(target: str, picture: bytes, samples: Sound, rate_hz: int, seed: int) -> Made:
    """Be a client of the suite at HOST:PORT: a picture and sound in, the frames and figures out.

    samples: (a, s) float32. Returns frames (1, h, w, 3) uint8 RGB.
    """
    options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        stub: pb_grpc.AvatarServiceAsyncStub = pb_grpc.AvatarServiceStub(channel)
        capabilities = await stub.GetCapabilities(pb.GetCapabilitiesRequest(), timeout=30)
        reference = (await stub.CreateReference(pb.CreateReferenceRequest(picture=picture), timeout=90)).reference
        if reference.notice:
            print(f"notice: {reference.notice}")
        request = pb.CreateSessionRequest(reference_id=reference.id, seed=seed)
        session = (await stub.CreateSession(request, timeout=30)).session
        video = capabilities.video
        num_blocks = math.ceil(samples.shape[1] / rate_hz * video.frame_rate_hz / capabilities.block_frames)
        call = stub.StreamAvatar()
        sound = types.AudioFormat(
            encoding=types.SAMPLE_ENCODING_FLOAT32, rate_hz=rate_hz, num_channels=samples.shape[0]
        )
        await call.write(pb.StreamAvatarRequest(open=pb.OpenAvatar(session_id=session.id, audio=sound)))
        await _answer(call)
        started = time.perf_counter()
        sending = asyncio.ensure_future(_send(call, samples, rate_hz))
        try:
            frames: list[types.VideoFrame] = []
            first_s = 0.0
            with tqdm(total=num_blocks * capabilities.block_frames - 3, unit="frame", desc="frames") as progress:
                while not (response := await _answer(call)).HasField("closed"):
                    if response.HasField("frame"):
                        first_s = first_s or time.perf_counter() - started
                        frames.append(response.frame)
                        progress.update()
            total_s = time.perf_counter() - started
            await sending
        finally:
            sending.cancel()
    made = [_pixels(frame, session.video) for frame in frames]
    return made, _figures(frames, response.closed, first_s, total_s, video.frame_rate_hz)


async def _answer(call: Call) -> pb.StreamAvatarResponse:
    response = await call.read()
    if not isinstance(response, pb.StreamAvatarResponse):
        raise RuntimeError("the gateway ended the stream early")
    return response


async def _send(call: Call, samples: Sound, rate_hz: int) -> None:
    step = round(rate_hz * PIECE_S)
    for start in range(0, samples.shape[1], step):
        data = samples[:, start : start + step].T.astype("<f4").tobytes()
        await call.write(pb.StreamAvatarRequest(audio=pb.AudioPiece(data=data)))
    await call.write(pb.StreamAvatarRequest(close=pb.CloseAvatar()))


def _pixels(frame: types.VideoFrame, video: types.VideoFormat) -> NDArray[np.uint8]:
    return np.frombuffer(frame.data, np.uint8).reshape(1, video.height, video.width, 3)


def _figures(
    frames: list[types.VideoFrame], closed: pb.AvatarClosed, first_s: float, total_s: float, frame_rate_hz: int
) -> Figures:
    content = hashlib.sha256()
    for frame in frames:
        content.update(frame.data)
    return Figures(
        num_frames=len(frames),
        first_frame=frames[0].index if frames else 0,
        frame_rate_hz=frame_rate_hz,
        video_s=len(frames) / frame_rate_hz,
        time_to_first_frame_s=first_s,
        total_s=total_s,
        blocks_per_s=closed.num_blocks / total_s,
        frames_sha256=content.hexdigest(),
        stages=[
            StageFigures(each.stage, each.num_blocks, each.busy_s / total_s, each.busy_s / max(1, each.num_blocks))
            for each in closed.stages
        ],
    )


def table(figures: Figures) -> str:
    """The figures as people read them."""
    lines = [
        f"{'frames':24}{figures.num_frames:>8}",
        f"{'seconds of video':24}{figures.video_s:>8.2f}",
        f"{'time to first frame':24}{figures.time_to_first_frame_s:>8.2f} s",
        f"{'blocks/s':24}{figures.blocks_per_s:>8.2f}   ({figures.video_s / figures.total_s:.2f} x real time)",
        "",
        f"{'stage':14}{'blocks':>8}{'busy':>8}{'mean step':>12}",
        *(
            f"{each.stage:14}{each.num_blocks:>8}{each.busy_share:>8.0%}{each.mean_step_s * 1000:>9.1f} ms"
            for each in figures.stages
        ),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except grpc.aio.AioRpcError as error:
        sys.exit(f"error: {error.code().name}: {error.details()}")
