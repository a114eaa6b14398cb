"""The demo as a newcomer runs it, and the command without transport beside it."""

import asyncio
import json
import sys
import wave
from pathlib import Path

import av
import pytest

from services.local.launch import ROOT
from tests.conftest import ASSETS, RATE_HZ, sound


async def run(*arguments: str) -> tuple[int, str]:
    """A Python program's exit status and output."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *arguments), cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    """Two seconds of sound, in a file whose name has a blank."""
    path = tmp_path / "my speech.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE_HZ)
        file.writeframes(sound(2))
    return path


def video_times(path: Path) -> list[float]:
    with av.open(str(path)) as film:
        return [float(frame.time) for frame in film.decode(video=0) if frame.time is not None]


async def test_the_demo_makes_a_film_and_says_what_it_measured(one_level: Path, speech: Path, tmp_path: Path) -> None:
    files = ("--speech", str(speech), "--portrait", str(ASSETS / "portrait.png"))
    status, output = await run(
        "-m", "services.local.demo", *files, "--checkpoint", str(one_level), "--out", str(tmp_path)
    )
    assert status == 0, output
    figures = json.loads((tmp_path / "demo.json").read_text())
    assert (figures["num_frames"], figures["first_frame"]) == (57, 3)
    assert [stage["num_blocks"] for stage in figures["stages"]] == [5] * 3
    assert video_times(tmp_path / "demo.mp4") == pytest.approx([index / 25 for index in range(3, 60)])
    for words in ("frames: 100%", "seconds of video", "time to first frame", "blocks/s", "busy", "mean step", "vae"):
        assert words in output


async def test_a_clip_is_rendered_without_transport(checkpoint: Path, speech: Path, tmp_path: Path) -> None:
    film = tmp_path / "new" / "clip.mp4"
    files = (str(speech), str(ASSETS / "portrait.png"), str(film))
    status, output = await run("-m", "avatar", *files, "--checkpoint", str(checkpoint))
    assert status == 0, output
    assert video_times(film) == pytest.approx([index / 25 for index in range(3, 60)])


@pytest.mark.parametrize("program", ["services.local.demo", "avatar"])
async def test_a_file_that_is_no_sound_ends_in_one_line(program: str, checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "notes.wav"
    text.write_text("not a sound")
    portrait = str(ASSETS / "portrait.png")
    arguments = (
        ["--speech", str(text)] if program == "services.local.demo" else [str(text), portrait, str(tmp_path / "x.mp4")]
    )
    status, output = await run("-m", program, *arguments, "--checkpoint", str(checkpoint))
    assert status == 1
    assert output.startswith("error: ")
    assert len(output.splitlines()) == 1
    assert "is not an audio file" in output
