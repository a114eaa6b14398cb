"""Tests of services.process: a start that fails ends in a few lines, and a process that is done ends at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from avatar import telemetry
from services.denoiser.__main__ import main
from services.local.processes import ROOT
from services.process import run


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("AVATAR_CAPACITY", "0", "AVATAR_CAPACITY is '0', expected at least 1"),
        ("AVATAR_CHECKPOINT", "nowhere", "no checkpoint at nowhere"),
        ("AVATAR_LEVELS", "9", "names level 9, the schedule has 0 to 2"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: str
) -> None:
    monkeypatch.setattr(telemetry, "set_up", lambda *_: None)  # it is set up once per process
    monkeypatch.setenv("AVATAR_CHECKPOINT", str(checkpoint))
    monkeypatch.setenv("AVATAR_LISTEN", "127.0.0.1:0")
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["denoiser"])
    with pytest.raises(SystemExit) as ended:
        run(main)
    line = str(ended.value.code)
    assert line.startswith("error: ")
    assert expected in line
    assert len(line.splitlines()) == 1


def test_a_process_prints_nothing_else_and_fails() -> None:
    environment = {**os.environ, "AVATAR_LISTEN": "127.0.0.1:0", "AVATAR_DRAIN_S": "soon"}
    program = [sys.executable, "-m", "services.gateway"]
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: AVATAR_DRAIN_S is 'soon', expected float\n"


@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("--port=7000", 2), ("models/tiny", 2)])
def test_arguments_do_not_start_a_service(
    argument: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def start() -> None:
        raise AssertionError("the service was started")

    monkeypatch.setattr(sys, "argv", ["gateway", argument])
    with pytest.raises(SystemExit) as ended:
        run(start)
    printed = capsys.readouterr()
    assert ended.value.code == status
    assert "usage: " in printed.out + printed.err
    assert ("AVATAR_*" in printed.out) if status == 0 else (argument in printed.err)


def test_the_usage_names_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "services.gateway", "-h"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: python -m services.gateway [-h]\n")


# Its provider exports more slowly than the process waits, or at once.
ENDING = """
import atexit, logging, sys, time
from opentelemetry import trace
from services.process import run

class Provider(trace.NoOpTracerProvider):
    def shutdown(self):
        time.sleep(float(DELAY_S))
        print("exported")

async def main():
    trace.set_tracer_provider(Provider())
    logging.basicConfig(level="INFO", format="%(message)s")
    atexit.register(print, "the interpreter ends")
    logging.info("stopped")

run(main)
"""


@pytest.mark.parametrize(("delay_s", "exported"), [("0", "exported\n"), ("3600", "")])
def test_a_process_that_is_done_exports_and_ends_without_the_interpreters_teardown(delay_s: str, exported: str) -> None:
    program = [sys.executable, "-c", ENDING.replace("DELAY_S", delay_s)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, exported, "stopped\n")
