"""Inject random faults into a suite while sessions stream: `make chaos`, or

    python -m tests.chaos [--minutes 10] [--seed N] [--sessions 4] [--only FAULT]

Prints a table of the consequences, and exits with status 1 if a bound was violated.
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
from tests.chaos.faults import FAULTS, Fault
from tests.chaos.report import Incident, Report
from tests.chaos.speaker import speaking
from tests.chaos.suite import GATEWAYS, REDIS, WORKERS, ChaosSuite, chaos_suite
from tests.conftest import ASSETS, speech, write_checkpoint
from tests.services.test_suite import rendered
from tests.services.voice.fakes import command, spoken_by

PORTRAIT, LOGS = ASSETS / "portrait.png", ROOT / "out/chaos"
PIECE_BYTES = 3840
SPEECH_S = 14.4
# Spoken in 14 s.
SENTENCES = [f"This is number {number} of my sentences." for number in range(8)]
SEEDS = range(3)
# Of every four sessions, the one that sends text.
TEXT_NUMBER = 2
# Ranges of the duration of a fault and of the pause after it, in seconds; in a pause the store is restored completely.
FAULT_S, PAUSE_S = (0.5, 10.0), (4.0, 8.0)


async def stream_sessions(
    suite: ChaosSuite,
    report: Report,
    pieces: Sequence[bytes | str],
    expected: list[list[bytes]],
    number: int,
    until_s: float,
) -> None:
    """Stream one session after another at the pace of speech. Sessions of odd numbers are live.

    pieces: of audio or text. expected: frames of each seed without faults.
    """
    picture, live, draw = PORTRAIT.read_bytes(), number % 2 == 1, random.Random(number)
    while time.monotonic() < until_s:
        started_s, seed, is_open = time.monotonic(), draw.choice(SEEDS), False
        try:
            async with speaking(suite.target, picture, seed=seed, live=live) as speaker:
                is_open = True
                for piece in pieces:
                    await speaker.say(piece)
                    await asyncio.sleep(SPEECH_S / len(pieces))
                await speaker.finish()
                report.add_session(speaker, started_s, None if live else expected[seed])
        except (AvatarError, TimeoutError) as error:
            incidents = report.since(started_s)
            if is_open or not incidents:
                report.add_violation(f"a session ended with {type(error).__name__}: {error}", incidents)
            report.counts["refused"] += not is_open
            await asyncio.sleep(1)


async def inject_faults(
    suite: ChaosSuite, report: Report, faults: Sequence[Fault], draw: random.Random, until_s: float
) -> None:
    """Inject one fault after another."""
    processes = {REDIS: (REDIS,), "gateway": GATEWAYS, **WORKERS}
    while time.monotonic() < until_s:
        await asyncio.sleep(draw.uniform(*PAUSE_S))
        report.measure_memory(suite)
        fault = draw.choice(faults)
        name, duration_s = draw.choice(processes[fault.service]), draw.uniform(*FAULT_S)
        print(f"{time.strftime('%X')} {fault.kind} {name} for {duration_s:.1f} s", flush=True)
        incident = Incident(fault, time.monotonic())
        report.incidents.append(incident)
        async with fault.at(suite, name):
            await asyncio.sleep(duration_s)
        await suite.until_healthy()
        incident.ended_s = time.monotonic() + PAUSE_S[0]


async def run(folder: Path, minutes: float, seed: int, num_sessions: int, faults: Sequence[Fault]) -> Report:
    """Run sessions and faults over a small checkpoint of random weights; return the report."""
    checkpoint, report = folder / "checkpoint", Report()
    write_checkpoint(checkpoint)
    data, portrait = speech(SPEECH_S), PORTRAIT.read_bytes()
    spoken = await spoken_by(command(folder), *SENTENCES)
    of_audio, of_text = [[rendered(checkpoint, portrait, each, seed) for seed in SEEDS] for each in (data, spoken)]
    audio = [data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES)]
    text = [f"{word} " for word in " ".join(SENTENCES).split()]
    shutil.rmtree(LOGS, ignore_errors=True)
    async with chaos_suite(checkpoint, LOGS) as suite:
        until_s = time.monotonic() + 60 * minutes
        async with asyncio.TaskGroup() as tasks:
            for number in range(num_sessions):
                pieces, expected = (text, of_text) if number % 4 == TEXT_NUMBER else (audio, of_audio)
                tasks.create_task(stream_sessions(suite, report, pieces, expected, number, until_s))
            tasks.create_task(inject_faults(suite, report, faults, random.Random(seed), until_s))
        try:
            await suite.until_idle()
        except TimeoutError as error:
            report.violations.append(str(error))
        report.measure_memory(suite)
    if alive := suite.pids & set(psutil.pids()):
        report.violations.append(f"{len(alive)} processes still run")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="of the faults")
    parser.add_argument("--sessions", type=int, default=4, help="every other one is live, one in four sends text")
    parser.add_argument("--only", default="", help="faults to inject, such as `kill` or `freeze vae`; by default all")
    flags = parser.parse_args()
    faults = [fault for fault in FAULTS if flags.only in str(fault)]
    print(f"seed {flags.seed}; logs of the processes are in {LOGS}", flush=True)
    with TemporaryDirectory() as folder:
        report = asyncio.run(run(Path(folder), flags.minutes, flags.seed, flags.sessions, faults))
    print("\n".join(report.table()))
    sys.exit(bool(report.violations))


if __name__ == "__main__":
    main()
