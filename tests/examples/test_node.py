"""The programs of examples/node, compiled and run by `make test-node` against a gateway."""

import asyncio
import re
from pathlib import Path

import av
import pytest

from tests.conftest import write_speech
from tests.proxy import proxied

FOLDER = Path(__file__).parents[2] / "examples/node"

pytestmark = pytest.mark.node


@pytest.fixture
def inputs(tmp_path: Path, picture: bytes) -> tuple[str, str]:
    """A WAV file of three seconds, and a portrait."""
    (tmp_path / "face.png").write_bytes(picture)
    return str(write_speech(tmp_path / "speech.wav", 3)), str(tmp_path / "face.png")


async def run(name: str, *arguments: str, status: int = 0) -> str:
    """Run a program, expect its exit status, and return its output."""
    process = await asyncio.create_subprocess_exec(
        "node",
        str(FOLDER / "build" / name),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode == status, output.decode()
    return output.decode()


def num_frames(path: Path) -> int:
    with av.open(str(path), mode="r", format="h264") as film:
        return sum(1 for _ in film.decode(video=0))


async def test_a_wav_becomes_h264(gateway: str, inputs: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out.h264"
    printed = await run("wav_to_h264.js", *inputs, str(out), "--target", gateway, "--seed", "7")
    assert "81 frames of 64 x 64, 0 resumes" in printed
    assert num_frames(out) == 81


async def test_a_broken_stream_resumes_with_the_same_bytes(
    gateway: str, inputs: tuple[str, str], tmp_path: Path
) -> None:
    """The seed is above 2^53, which a JavaScript number does not hold."""
    whole, broken = tmp_path / "whole.h264", tmp_path / "broken.h264"
    flags = ["--target", gateway, "--seed", str(2**62 + 1)]
    await run("wav_to_h264.js", *inputs, str(whole), *flags)
    printed = await run("wav_to_h264.js", *inputs, str(broken), *flags, "--break-at", "12")
    assert "81 frames of 64 x 64, 1 resumes" in printed
    assert broken.read_bytes() == whole.read_bytes()


async def test_a_connection_that_is_cut_resumes(gateway: str, inputs: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out.h264"
    speech = str(write_speech(tmp_path / "long.wav", 12))
    async with proxied(gateway) as proxy:
        running = asyncio.create_task(run("wav_to_h264.js", speech, inputs[1], str(out), "--target", proxy.target))
        while not running.done() and not (out.exists() and out.stat().st_size):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        proxy.cut()
        assert "297 frames of 64 x 64, 1 resumes" in await running
    assert num_frames(out) == 297


async def test_an_error_names_its_reason_and_field(gateway: str) -> None:
    printed = await run("error.js", "--target", gateway)
    assert re.search(r"^INVALID_FIELD: picture: .+\n  picture: \S.+$", printed, re.MULTILINE)
    assert re.search(r"^SESSION_NOT_FOUND: \S.+$", printed, re.MULTILINE)


async def test_a_live_stream_is_interrupted(gateway: str, inputs: tuple[str, str]) -> None:
    printed = await run("live.js", *inputs, "--target", gateway, "--interrupt-after", "1.5")
    assert re.search(r"^interrupted at [\d.]+ s, speaking: true$", printed, re.MULTILINE)
    finished = re.findall(r"^playback_finished (.*)$", printed, re.MULTILINE)
    assert ['"interrupted":true' in event for event in finished] == [True, False]


async def test_a_missing_gateway_is_reported_in_a_line(inputs: tuple[str, str], tmp_path: Path) -> None:
    out = str(tmp_path / "out.h264")
    printed = await run("wav_to_h264.js", *inputs, out, "--target", "127.0.0.1:1", status=1)
    assert re.fullmatch(r"error: .*127\.0\.0\.1:1.*\n", printed)
