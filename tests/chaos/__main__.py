"""Break a suite at random while sessions speak: `make chaos`, or

    python -m tests.chaos [--minutes 10] [--seed N] [--sessions 4] [--only FAULT]

Ends with a table of what that has cost, and with exit status 1 if it was more than time.
"""

import argparse
import asyncio
import random
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from avatar.errors import AvatarError
from services.local.processes import ROOT
from tests.chaos.account import Account, Struck
from tests.chaos.faults import FAULTS, Fault
from tests.chaos.speaker import speaking
from tests.chaos.suite import GATEWAYS, REDIS, WORKERS, Spared, spared
from tests.conftest import ASSETS, speech, write_checkpoint
from tests.services.test_suite import rendered

PORTRAIT, LOGS = ASSETS / "portrait.png", ROOT / "out/chaos"
PIECE_BYTES, PIECE_S = 3840, 0.12
SPEECH_S = 14.4
SEEDS = range(3)
# Seconds that a fault lasts, and seconds of rest after it, in which the store is written again.
BROKEN_S, WHOLE_S = (0.5, 10.0), (4.0, 8.0)


async def talk(suite: Spared, account: Account, expected: list[list[bytes]], number: int, until_s: float) -> None:
    """Hold one session after another, each speaking as fast as people do; every other one is live."""
    picture, live, draw = PORTRAIT.read_bytes(), number % 2 == 1, random.Random(number)
    while time.monotonic() < until_s:
        began_s, seed, is_open = time.monotonic(), draw.choice(SEEDS), False
        try:
            async with speaking(suite.target, picture, seed=seed, live=live) as speaker:
                is_open, data = True, speech(SPEECH_S)
                for start in range(0, len(data), PIECE_BYTES):
                    await speaker.say(data[start : start + PIECE_BYTES])
                    await asyncio.sleep(PIECE_S)
                await speaker.finish()
                account.ended(speaker, began_s, None if live else expected[seed])
        except (AvatarError, TimeoutError) as error:
            struck = account.since(began_s)
            if is_open or not struck:
                account.blame(f"a session ended with {type(error).__name__}: {error}", struck)
            account.counts["refused"] += not is_open
            await asyncio.sleep(1)


async def strike(suite: Spared, account: Account, faults: Sequence[Fault], draw: random.Random, until_s: float) -> None:
    """Break one thing after another."""
    processes = {REDIS: (REDIS,), "gateway": GATEWAYS, **WORKERS}
    while time.monotonic() < until_s:
        await asyncio.sleep(draw.uniform(*WHOLE_S))
        account.remember(suite)
        fault = draw.choice(faults)
        name, broken_s = draw.choice(processes[fault.service]), draw.uniform(*BROKEN_S)
        print(f"{time.strftime('%X')} {fault.way} {name} for {broken_s:.1f} s", flush=True)
        struck = Struck(fault, time.monotonic())
        account.struck.append(struck)
        async with fault.at(suite, name):
            await asyncio.sleep(broken_s)
        await suite.until_whole()
        struck.ended_s = time.monotonic() + WHOLE_S[0]


async def run(folder: Path, minutes: float, seed: int, num_sessions: int, faults: Sequence[Fault]) -> Account:
    """All of it, over a small checkpoint of random weights."""
    checkpoint, account = folder / "checkpoint", Account()
    write_checkpoint(checkpoint)
    expected = [rendered(checkpoint, PORTRAIT.read_bytes(), speech(SPEECH_S), each) for each in SEEDS]
    shutil.rmtree(LOGS, ignore_errors=True)
    async with spared(checkpoint, LOGS) as suite:
        until_s = time.monotonic() + 60 * minutes
        async with asyncio.TaskGroup() as tasks:
            for number in range(num_sessions):
                tasks.create_task(talk(suite, account, expected, number, until_s))
            tasks.create_task(strike(suite, account, faults, random.Random(seed), until_s))
        try:
            await suite.until_nothing_is_left()
        except TimeoutError as error:
            account.violations.append(str(error))
        account.remember(suite)
    if alive := suite.pids & set(psutil.pids()):
        account.violations.append(f"{len(alive)} processes are left")
    return account


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="of what breaks when")
    parser.add_argument("--sessions", type=int, default=4, help="that speak at a time; every other one is live")
    parser.add_argument(
        "--only", default="", help="what may break, such as `kill` or `freeze vae`; by default anything"
    )
    flags = parser.parse_args()
    faults = [fault for fault in FAULTS if flags.only in str(fault)]
    print(f"seed {flags.seed}; the processes' output is in {LOGS}", flush=True)
    with TemporaryDirectory() as folder:
        account = asyncio.run(run(Path(folder), flags.minutes, flags.seed, flags.sessions, faults))
    print("\n".join(account.table()))
    sys.exit(bool(account.violations))


if __name__ == "__main__":
    main()
