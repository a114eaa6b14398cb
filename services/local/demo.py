"""The demo: the suite as processes, and a client that makes a video with it.

    python -m services.local.demo [--speech speech.wav | --text TEXT] [--portrait face.png] [--levels N] [--out out]

Writes OUT/demo.mp4 and OUT/demo.json, and prints the measurements, among them the reaction of a live session.
AVATAR_REDIS_URL names a Redis server to use; without it, one is started and ends with the demo.
"""

import argparse
import asyncio
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from avatar.aio import background
from avatar.client import Audio, AvatarError, Frame, Notice, Stream, connect
from avatar.media import film_signer, read_audio, write_mp4
from services.local.launch import launched
from services.local.local_voice import start_piper, voice_settings
from services.local.processes import ROOT, Suite

# The first frames of a session's first block are the VAE's start, and are not sent.
FIRST_FRAME = 3
# Clicks whose reaction is measured, in pieces of a microphone's audio, and the longest time for each.
TRIALS, TRIAL_S = 3, 10.0
RATE_HZ, PIECE_S = 16000, 0.04
SILENCE = bytes(2 * round(RATE_HZ * PIECE_S))
CLICK = b"\xff\x3f" + SILENCE[2:]


@dataclass(frozen=True)
class StageMeasurements:
    """One stage: its blocks, the share of the time that it computed, and its seconds per block."""

    stage: str
    num_blocks: int
    busy_share: float
    mean_step_s: float


@dataclass(frozen=True)
class Measurements:
    """Measurements of one video. Times are seconds from the first piece of audio.

    num_levels, num_trained_levels: denoising levels that ran, and that the checkpoint was trained for.
    """

    num_frames: int
    first_frame: int
    frame_rate_hz: int
    video_s: float
    time_to_first_frame_s: float
    total_s: float
    blocks_per_s: float
    frames_sha256: str
    num_levels: int
    num_trained_levels: int
    stages: list[StageMeasurements]


@dataclass(frozen=True)
class Reaction:
    """Seconds from a piece of a microphone's audio to the first frame that shows it, in a live session.

    median_s: of `TRIALS` clicks; None if there was no live session. promised_s: by the gateway; 0 if it promises none.
    note: of a refusal.
    """

    median_s: float | None
    promised_s: float
    note: str = ""


Result = TypeVar("Result")
Video: TypeAlias = tuple[list[NDArray[np.uint8]], NDArray[np.float32], Measurements]


async def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m services.local.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--speech", type=Path, default=ROOT / "assets/speech.wav", help="speech to speak")
    parser.add_argument("--text", default="", help="text to speak, in place of speech, by the installed voice")
    parser.add_argument("--tts", default="", metavar="COMMAND", help="speaks {text} into {wav} (default: Piper)")
    parser.add_argument("--portrait", type=Path, default=ROOT / "assets/portrait.png", help="picture of the speaker")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "models/tiny", help="folder of the models")
    parser.add_argument("--levels", type=int, help="denoising levels, at most the checkpoint's (default: all of them)")
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="folder to write to")
    parser.add_argument("--seed", type=int, default=420)
    parser.add_argument("--c2pa", type=Path, nargs=2, metavar=("CERT", "KEY"), help="PEM files to sign the video with")
    flags = parser.parse_args()
    signer = film_signer(flags.c2pa)
    speech, rate_hz = (flags.text, RATE_HZ) if flags.text else read_audio(flags.speech)
    voice = voice_settings(flags.tts) if flags.text else {}
    if flags.text and not voice:
        parser.error("there is no voice: run make demo TEXT=..., which installs Piper, or give --tts")
    portrait = flags.portrait.read_bytes()
    print(f"starting Redis, audio, a denoiser for each level, vae and gateway; their output is in {flags.out / 'logs'}")
    async with AsyncExitStack() as stack:
        with tqdm(bar_format="healthy processes: {n_fmt} [{elapsed}]") as healthy:
            redis_url = os.environ.get("AVATAR_REDIS_URL")
            launching = launched(
                flags.checkpoint,
                flags.out / "logs",
                levels=flags.levels,
                redis_url=redis_url,
                voice=voice,
                report=lambda _: healthy.update(),
            )
            suite = await stack.enter_async_context(launching)
        await start_piper(suite, voice)
        making = make_video(suite.gateway, portrait, speech, rate_hz, flags.seed)
        frames, samples, measured = await _unless_a_process_ends(suite, making)
        reaction = await _unless_a_process_ends(suite, measure_reaction(suite.gateway, portrait))
    film = flags.out / "demo.mp4"
    write_mp4(film, frames, measured.frame_rate_hz, measured.first_frame, samples, rate_hz, signer=signer)
    record = {**asdict(measured), "reaction": asdict(reaction)}
    (flags.out / "demo.json").write_text(json.dumps(record, indent=2) + "\n")
    print(table(measured, reaction))
    print(f"wrote {film} and {flags.out / 'demo.json'}")
    print("six more people to choose from: make demo PORTRAIT=assets/portraits/1.png ... 6.png")


async def _unless_a_process_ends(suite: Suite, client: Coroutine[Any, Any, Result]) -> Result:
    """Return the client's result. RuntimeError if a process of the suite ends first."""
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


async def make_video(target: str, portrait: bytes, speech: NDArray[np.float32] | str, rate_hz: int, seed: int) -> Video:
    """Make a video at the gateway HOST:PORT, as a product's client does.

    speech: (a, s) float32, or text. Returns frames (1, h, w, 3) uint8 RGB, their audio (a, s) float32, and their
    measurements.
    """
    audio, num_channels, num_frames = None, 1, None
    if not isinstance(speech, str):
        audio, num_channels = speech.T.astype("<f4").tobytes(), len(speech)
    frames: list[bytes] = []
    times_s: list[float] = []
    returned = bytearray()
    async with connect(target) as avatar:
        session = await avatar.create(portrait, seed=seed)
        if session.notice:
            print(f"notice: {session.notice}")
        video, limits = session.video, await avatar.limits()
        block_frames = limits.block_frames
        if not isinstance(speech, str):
            num_blocks = math.ceil(speech.shape[1] / rate_hz * video.frame_rate_hz / block_frames)
            num_frames = num_blocks * block_frames - FIRST_FRAME
        options: Any = {"rate_hz": rate_hz, "channels": num_channels, "encoding": "float32"}
        async with session.stream(audio=audio, return_audio=audio is None, **options) as stream:
            started = time.perf_counter()
            if isinstance(speech, str):
                await stream.say(speech)
                await stream.close()
            with tqdm(total=num_frames, unit="frame", desc="frames") as progress:
                async for item in stream:
                    match item:
                        case Frame():
                            frames.append(item.data)
                            times_s.append(time.perf_counter() - started)
                            progress.update()
                        case Audio():
                            returned += item.data
                        case Notice():
                            print(f"notice: {item.message}")
            total_s = time.perf_counter() - started
    assert stream.closed
    if not frames:
        raise RuntimeError("nothing was spoken")
    if isinstance(speech, str):  # its audio begins with the first frame
        start = np.zeros(FIRST_FRAME * rate_hz // video.frame_rate_hz, np.float32)
        speech = np.concatenate([start, np.frombuffer(returned, "<f4")])[None]
    measured = Measurements(
        num_frames=len(frames),
        first_frame=FIRST_FRAME,
        frame_rate_hz=video.frame_rate_hz,
        video_s=len(frames) / video.frame_rate_hz,
        time_to_first_frame_s=times_s[0],
        total_s=total_s,
        blocks_per_s=stream.closed.num_blocks / total_s,
        frames_sha256=hashlib.sha256(b"".join(frames)).hexdigest(),
        num_levels=limits.num_levels,
        num_trained_levels=limits.num_trained_levels,
        stages=[
            StageMeasurements(each.stage, each.num_blocks, each.busy_s / total_s, each.busy_s / max(1, each.num_blocks))
            for each in stream.closed.stages
        ],
    )
    shape = 1, video.height, video.width, 3
    return [np.frombuffer(each, np.uint8).reshape(shape) for each in frames], speech, measured


async def measure_reaction(target: str, portrait: bytes) -> Reaction:
    """Speak several times into a live session, as a microphone would, and measure how soon frames show it."""
    async with connect(target) as avatar:
        promised_s, reactions_s = (await avatar.limits()).reaction_s, list[float]()
        try:
            session = await avatar.create(portrait)
            async with asyncio.timeout(TRIALS * TRIAL_S), session.stream(live=True) as stream:
                frames = stream.frames()
                for trial in range(TRIALS):
                    await _until(frames, is_idle=True)
                    await asyncio.sleep(PIECE_S * (1 + 2 * trial))  # at different positions within a block
                    reactions_s.append(await _reaction_s(stream, frames))
                    await stream.interrupt()
        except (AvatarError, TimeoutError) as error:
            if not reactions_s:
                return Reaction(None, promised_s, f"no live session: {getattr(error, 'message', 'it took too long')}")
    return Reaction(median(reactions_s), promised_s)


async def _reaction_s(stream: Stream, frames: AsyncGenerator[Frame, None]) -> float:
    """Push a click and silence in real time; return the seconds until the first frame of speech arrives."""
    started = time.perf_counter()

    async def speak() -> None:
        for number in count():
            await stream.push(SILENCE if number else CLICK)
            await asyncio.sleep(max(0.0, started + (number + 1) * PIECE_S - time.perf_counter()))

    async with background(speak()):
        await _until(frames, is_idle=False)
        return time.perf_counter() - started


async def _until(frames: AsyncGenerator[Frame, None], *, is_idle: bool) -> None:
    """Read frames up to the first idle one, or the first of speech."""
    async for frame in frames:
        if frame.is_idle == is_idle:
            return


def table(measured: Measurements, reaction: Reaction) -> str:
    """Return the measurements as a table to print."""
    levels, trained = measured.num_levels, measured.num_trained_levels
    shown = "       -" if reaction.median_s is None else f"{reaction.median_s:>8.2f} s"
    promise = f"promised {reaction.promised_s:.2f} s" if reaction.promised_s else "not promised: too slow for live"
    lines = [
        f"{'frames':24}{measured.num_frames:>8}",
        f"{'seconds of video':24}{measured.video_s:>8.2f}",
        f"{'time to first frame':24}{measured.time_to_first_frame_s:>8.2f} s",
        f"{'reaction, live':24}{shown} ({promise}) {reaction.note}".rstrip(),
        f"{'denoising levels':24}{levels:>8}" + (f"   of the {trained} trained" if levels < trained else ""),
        f"{'blocks/s':24}{measured.blocks_per_s:>8.2f}   ({measured.video_s / measured.total_s:.2f} x real time)",
        "",
        f"{'stage':14}{'blocks':>8}{'busy':>8}{'mean step':>12}",
        *(
            f"{each.stage:14}{each.num_blocks:>8}{each.busy_share:>8.0%}{each.mean_step_s * 1000:>9.1f} ms"
            for each in measured.stages
        ),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except AvatarError as error:
        sys.exit(f"error: {error.reason}: {error.message}")
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
