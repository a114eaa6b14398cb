"""Run many sessions at once, each with the same speech and its own seed.

python examples/many_sessions.py assets/speech.wav assets/portrait.png --sessions 4
"""

import argparse
import asyncio
import os
import sys
import time

from avatar.client import Avatar, AvatarError, channel_credentials, connect, read_wav
from avatar.errors import ConnectionLost

HINT = "is a gateway running there? `python -m services` starts one on this machine"


async def run_session(avatar: Avatar, number: int, portrait: str, speech: bytes, rate_hz: int) -> None:
    """Run one session to its end. If the deployment is full, retry after the delay that it gives."""
    started, first_s, num_frames = time.monotonic(), 0.0, 0
    while True:
        try:
            session = await avatar.create(portrait, seed=number)
            if session.notice:
                print(f"session {number}: notice: {session.notice}")
            async with session.stream(audio=speech, rate_hz=rate_hz) as stream:
                async for _ in stream.frames():
                    first_s = first_s or time.monotonic() - started
                    num_frames += 1
            break
        except AvatarError as error:
            if num_frames or error.retry_s is None:
                raise
            print(f"session {number}: {error.reason}, retry in {error.retry_s:g} s")
            await asyncio.sleep(error.retry_s)
    rate = num_frames / (time.monotonic() - started)
    print(f"session {number}: {num_frames} frames, the first after {first_s:.2f} s, {rate:.1f} per second")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("speech", help="WAV file")
    parser.add_argument("portrait", help="PNG, JPEG, WebP, HEIC or AVIF file")
    parser.add_argument("--target", default="127.0.0.1:7000", help="HOST:PORT of the gateway")
    parser.add_argument("--tls", nargs="?", const="", metavar="CA", help="use TLS; PEM file of a private authority")
    parser.add_argument("--token", default=os.environ.get("AVATAR_TOKEN", ""), help="bearer token; or AVATAR_TOKEN")
    parser.add_argument("--sessions", type=int, default=4)
    flags = parser.parse_args()
    speech, rate_hz = read_wav(flags.speech)

    credentials = None if flags.tls is None else channel_credentials(flags.tls)
    async with (
        connect(flags.target, credentials=credentials, token=flags.token) as avatar,
        asyncio.TaskGroup() as tasks,
    ):
        for number in range(flags.sessions):
            tasks.create_task(run_session(avatar, number, flags.portrait, speech, rate_hz))


if __name__ == "__main__":
    failed = None
    try:
        asyncio.run(main())
    except* (AvatarError, ValueError, OSError) as errors:  # of a task group's, the first one says what went wrong
        failed = errors.exceptions[0]
    if failed:
        sys.exit(f"error: {failed}; {HINT}" if isinstance(failed, ConnectionLost) else f"error: {failed}")
