"""Programs, commands, excerpts and tables of docs/integration.md."""

import asyncio
import inspect
import re
import subprocess
import sys
from pathlib import Path
from textwrap import indent

import google.rpc
import pytest

from avatar.client import Session
from tests.conftest import write_speech

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/integration.md").read_text(encoding="utf-8")
LANGUAGES = PAGE.split("## Other languages\n")[1].split("\n## ")[0]
SOURCES = {"ts": "examples/node/*.ts", "go": "examples/go/*.go"}

# Surroundings of the excerpts in Python: a gateway, a portrait, and a body for `talk`.
PROGRAM = """
import asyncio
from avatar.client import *

token = ""

def show(data, pts_s):
    print("frame", pts_s)

async def talk(stream):
    async def receive():
{frames}
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(receive())
        await stream.push(bytes(48000))
        await stream.end_turn()
        await asyncio.sleep(0.5)
{interrupt}
        await stream.close()

async def main():
{open}
    async with connect("127.0.0.1:7000") as avatar:
{error}

asyncio.run(main())
"""


def blocks(language: str, text: str = LANGUAGES) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


async def run(*arguments: str) -> str:
    """Run a program that succeeds, and return its output."""
    process = await asyncio.create_subprocess_exec(
        *arguments, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()


async def test_the_first_program_runs(gateway: str, picture: bytes, tmp_path: Path) -> None:
    (tmp_path / "face.png").write_bytes(picture)
    wav = str(write_speech(tmp_path / "speech.wav", 1.5))
    program = blocks("python", PAGE)[0]
    for written, here in (
        ("assets/speech.wav", wav),
        ("assets/portrait.png", str(tmp_path / "face.png")),
        ("127.0.0.1:7000", gateway),
    ):
        assert written in program
        program = program.replace(written, here)
    notice, *lines = (await run(sys.executable, "-c", program)).splitlines()
    assert "No face" in notice
    assert [line.split()[0] for line in lines] == [str(index) for index in range(3, 48)]


async def test_the_excerpts_in_python_run(gateway: str, picture: bytes, tmp_path: Path) -> None:
    (tmp_path / "face.png").write_bytes(picture)
    (tmp_path / "face.txt").write_text("no picture")
    opening, frames, interrupt, error = blocks("python")
    program = PROGRAM.format(
        open=indent(opening, " " * 4),
        frames=indent(frames, " " * 8),
        interrupt=indent(interrupt, " " * 8),
        error=indent(error, " " * 8),
    )
    for written, here in (
        ("127.0.0.1:7000", gateway),
        ("face.png", str(tmp_path / "face.png")),
        ("face.txt", str(tmp_path / "face.txt")),
    ):
        assert written in program
        program = program.replace(written, here)
    printed = await run(sys.executable, "-c", program)
    assert re.search(r"^frame 0\.12$", printed, re.MULTILINE)
    assert re.search(r"^turn 0: [\d.]+ s spoken$", printed, re.MULTILINE)
    assert re.search(r"^[\d.]+ s were spoken$", printed, re.MULTILINE)
    assert re.search(r"^INVALID_FIELD .*picture", printed, re.MULTILINE)


@pytest.mark.parametrize("language", SOURCES)
def test_excerpts_are_lines_of_the_examples(language: str) -> None:
    sources = ["\n".join(map(str.strip, path.read_text().splitlines())) for path in ROOT.glob(SOURCES[language])]
    excerpts = [
        "\n".join(map(str.strip, part.splitlines())) for each in blocks(language) for part in each.split("\n\n")
    ]
    assert len(excerpts) > 5
    assert [excerpt for excerpt in excerpts if not any(f"{excerpt.strip()}\n" in source for source in sources)] == []


async def test_buf_curl_calls_a_gateway(gateway: str) -> None:
    (script,) = blocks("bash")
    assert "127.0.0.1:7000" in script
    printed = await run("bash", "-euo", "pipefail", "-c", script.replace("127.0.0.1:7000", gateway))
    assert '"blockFrames": 12' in printed
    assert re.findall(r'^  "(opened|closed)"', printed, re.MULTILINE) == ["opened", "closed"]
    assert printed.count('"frame": {') == 33


def test_all_arguments_of_stream_are_in_the_table() -> None:
    table = PAGE.split("All arguments\n")[1].split("\n\n`close`")[0]
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \| \S.* \|$", table, re.MULTILINE)
    parameters = list(inspect.signature(Session.stream).parameters.values())[1:]
    assert rows == [(each.name, repr(each.default).replace("'", '"')) for each in parameters]


def test_files_of_google_rpc_are_those_of_the_package() -> None:
    """The package generates the same messages for Python: googleapis-common-protos."""
    (package,) = google.rpc.__path__
    for path in (ROOT / "third_party/google/rpc").iterdir():
        assert path.read_bytes() == (Path(package) / path.name).read_bytes()


def test_no_code_is_generated_for_google_rpc() -> None:
    """A second package `google` would hide the first."""
    listed = subprocess.run(["buf", "ls-files", "protos"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "avatar_service.proto" in listed
    assert "google/rpc" not in listed
    assert not (ROOT / "google").exists()
