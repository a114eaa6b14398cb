"""Stream a WAV file in real time, like a microphone: speak through the avatar and interrupt it, or talk to it.

python examples/live_microphone.py assets/speech.wav assets/portrait.png --interrupt-after 2
python examples/live_microphone.py assets/speech.wav assets/portrait.png --talk
"""

import argparse
import asyncio
import os
import sys
from collections import Counter
from collections.abc import Awaitable, Callable

from avatar.client import AvatarError, Frame, Stream, channel_credentials, connect, read_wav
from avatar.errors import ConnectionLost

HINT = "is a gateway running there? `python -m services` starts one on this machine"
PIECE_S = 0.04


async def record(send: Callable[[bytes], Awaitable[None]], audio: bytes, rate_hz: int) -> None:
    """Send audio in real time."""
    piece_bytes = 2 * round(rate_hz * PIECE_S)
    for start in range(0, len(audio), piece_bytes):
        await send(audio[start : start + piece_bytes])
        await asyncio.sleep(PIECE_S)


async def speak(stream: Stream, speech: bytes, rate_hz: int) -> None:
    """Push audio in real time, then end the turn."""
    await record(stream.push, speech, rate_hz)
    await stream.end_turn()


async def print_items(stream: Stream) -> None:
    """Print events, and the number of frames between them."""
    num_frames: Counter[str] = Counter()
    async for item in stream:
        if isinstance(item, Frame):
            num_frames["idle" if item.is_idle else "speaking"] += 1
        else:
            print(f"{dict(num_frames)} frames, then {item}")
    print(f"{dict(num_frames)} frames in total")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("speech", help="WAV file")
    parser.add_argument("portrait", help="PNG, JPEG, WebP, HEIC or AVIF file")
    parser.add_argument("--target", default="127.0.0.1:7000", help="HOST:PORT of the gateway")
    parser.add_argument("--tls", nargs="?", const="", metavar="CA", help="use TLS; PEM file of a private authority")
    parser.add_argument("--token", default=os.environ.get("AVATAR_TOKEN", ""), help="bearer token; or AVATAR_TOKEN")
    parser.add_argument("--interrupt-after", type=float, default=2.0, help="seconds of speech before the interrupt")
    parser.add_argument("--talk", action="store_true", help="talk to the avatar, which listens, where it can")
    flags = parser.parse_args()
    speech, rate_hz = read_wav(flags.speech)

    credentials = None if flags.tls is None else channel_credentials(flags.tls)
    async with connect(flags.target, credentials=credentials, token=flags.token) as avatar:
        session = await avatar.create(flags.portrait)
        if session.notice:
            print(f"notice: {session.notice}")
        async with session.stream(rate_hz=rate_hz, live=True, video="jpeg") as stream, asyncio.TaskGroup() as tasks:
            tasks.create_task(print_items(stream))
            if flags.talk:
                await record(stream.listen, speech, rate_hz)
                await stream.close()
                return
            speaking = tasks.create_task(speak(stream, speech, rate_hz))
            await asyncio.sleep(flags.interrupt_after)
            speaking.cancel()
            print(await stream.interrupt())
            await speak(stream, speech[: 2 * rate_hz], rate_hz)  # the next turn: its first second
            await stream.close()


if __name__ == "__main__":
    failed = None
    try:
        asyncio.run(main())
    except* (AvatarError, ValueError, OSError) as errors:  # of a task group's, the first one says what went wrong
        failed = errors.exceptions[0]
    if failed:
        sys.exit(f"error: {failed}; {HINT}" if isinstance(failed, ConnectionLost) else f"error: {failed}")
