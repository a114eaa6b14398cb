"""Stream sessions at the pace of speech: `python -m tests.containers.sessions HOST:PORT [--sessions 2] [--speech 7.2]`.

Prints "streaming" when every session has its first frame, and exits with status 1 if a frame is lost or repeated.
"""

import argparse
import asyncio
import sys
from contextlib import AsyncExitStack

from avatar.errors import AvatarError
from tests.chaos.speaker import Speaker, speaking
from tests.conftest import ASSETS, speech

PIECE_BYTES, PIECE_S = 3840, 0.12
SPEECH_S = 7.2


async def speak(speaker: Speaker, seconds: float) -> None:
    """Speak at the pace of speech, until all frames are there."""
    data = speech(seconds)
    for start in range(0, len(data), PIECE_BYTES):
        await speaker.say(data[start : start + PIECE_BYTES])
        await asyncio.sleep(PIECE_S)
    await speaker.finish()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target", help="HOST:PORT of the gateway")
    parser.add_argument("--sessions", type=int, default=2)
    parser.add_argument("--speech", type=float, default=SPEECH_S, help="seconds")
    flags = parser.parse_args()
    portrait = (ASSETS / "portrait.png").read_bytes()
    try:
        async with AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
            speakers = [
                await stack.enter_async_context(speaking(flags.target, portrait, seed=seed, live=False))
                for seed in range(flags.sessions)
            ]
            speaking_all = [tasks.create_task(speak(speaker, flags.speech)) for speaker in speakers]
            for speaker in speakers:
                await speaker.until(1)
            print("streaming", flush=True)
            await asyncio.wait(speaking_all)
    except* (AvatarError, TimeoutError) as errors:
        sys.exit(f"sessions ended with {errors.exceptions}")
    lost, repeated = sum(each.num_lost for each in speakers), sum(each.num_repeated for each in speakers)
    frames, jumps = sum(len(each.received) for each in speakers), sum(len(each.jumps) for each in speakers)
    print(f"{frames} frames in {flags.sessions} sessions, {lost} lost, {repeated} repeated, {jumps} discontinuities")
    sys.exit(1 if lost or repeated else 0)


if __name__ == "__main__":
    asyncio.run(main())
