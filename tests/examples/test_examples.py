"""Every example, run as its docstring describes."""

import asyncio
import re
import sys
from pathlib import Path

import av
import pytest

from tests.conftest import RATE_HZ, write_speech

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def wav(tmp_path: Path) -> str:
    """A WAV file of a second and a half."""
    return str(write_speech(tmp_path / "speech.wav", 1.5))


@pytest.fixture
def portrait(tmp_path: Path, picture: bytes) -> str:
    path = tmp_path / "face.png"
    path.write_bytes(picture)
    return str(path)


async def run(name: str, *flags: str) -> str:
    """Run an example and return its output."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, EXAMPLES / name, *flags, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()


async def test_a_wav_becomes_an_mp4(gateway: str, wav: str, portrait: str, tmp_path: Path) -> None:
    out = tmp_path / "out.mp4"
    printed = await run("wav_to_mp4.py", wav, portrait, str(out), "--target", gateway, "--seed", "7")
    assert "45 frames of 64 x 64" in printed
    with av.open(str(out)) as film:
        times = [frame.time for frame in film.decode(video=0)]
    with av.open(str(out)) as film:
        num_samples = sum(frame.samples for frame in film.decode(audio=0))
    assert times == pytest.approx([index / 25 for index in range(3, 48)], abs=1e-3)
    assert num_samples == pytest.approx(1.5 * RATE_HZ, abs=2048)


async def test_a_microphone_is_interrupted(gateway: str, wav: str, portrait: str) -> None:
    printed = await run("live_microphone.py", wav, portrait, "--target", gateway, "--interrupt-after", "1")
    assert re.search(r"^Interrupted\(.*was_speaking=True\)", printed, re.MULTILINE)
    assert printed.count("PlaybackStarted") in (1, 2), "the interrupt may precede the first turn's first frame"
    assert printed.count("was_interrupted=True") == printed.count("was_interrupted=False") == 1


async def test_many_sessions_speak_at_once(gateway: str, wav: str, portrait: str) -> None:
    printed = await run("many_sessions.py", wav, portrait, "--target", gateway, "--sessions", "3")
    assert re.findall(r"session (\d): 45 frames", "\n".join(sorted(printed.splitlines()))) == ["0", "1", "2"]
