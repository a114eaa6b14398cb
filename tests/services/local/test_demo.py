"""Tests of the programs of a first visit: the demo, and the command that renders a clip without transport."""

import json
import re
import runpy
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import pytest

from avatar.settings import GatewaySettings
from avatar.store.redis import RedisHashes
from avatar.store.sessions import SessionStore
from services.local import launch
from services.local.launch import launched
from services.local.processes import Suite, free_ports, start_redis, until_healthy
from services.local.suite import suite
from tests.conftest import ASSETS, write_speech
from tests.services.voice.fakes import command

DEMO, RENDER = "services.local.demo", "avatar"
PORTRAIT = str(ASSETS / "portrait.png")


def run(monkeypatch: pytest.MonkeyPatch, program: str, *arguments: object) -> None:
    """Run `python -m program` in this process, which has loaded torch already."""
    monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
    monkeypatch.delitem(sys.modules, program if program == DEMO else f"{program}.__main__", raising=False)
    runpy.run_module(program, run_name="__main__", alter_sys=True)


@pytest.fixture
def wav(tmp_path: Path) -> Path:
    """Two seconds of audio, in a file whose name has a blank."""
    return write_speech(tmp_path / "my speech.wav", 2.0)


def frame_times(path: Path) -> list[float]:
    with av.open(str(path)) as video:
        return [float(frame.time) for frame in video.decode(video=0) if frame.time is not None]


@asynccontextmanager
async def in_this_process(
    checkpoint: Path, folder: Path, *, levels: int, report: Callable[[str], object], **_: Any
) -> AsyncGenerator[Suite, None]:
    """Stand in for `launched`, without processes of its own but Redis."""
    folder.mkdir()
    [port] = free_ports(1)
    async with Suite(folder, f"redis://127.0.0.1:{port}", {}) as processes:
        await start_redis(processes, port)
        await until_healthy(processes)
        store = SessionStore(RedisHashes(processes.redis_url))
        settings = GatewaySettings(listen="127.0.0.1:0", schedule=levels)
        async with suite(checkpoint, store, settings) as target:
            report("gateway")
            yield replace(processes, targets={"gateway": target})
        await store.aclose()


@pytest.mark.parametrize("launcher", [in_this_process, pytest.param(launched, marks=pytest.mark.slow)])
def test_the_demo_makes_a_video_with_fewer_levels_and_prints_measurements(
    launcher: Any,
    checkpoint: Path,
    wav: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(launch, "launched", launcher)
    monkeypatch.delenv("AVATAR_REDIS_URL", raising=False)
    files = ("--speech", wav, "--portrait", PORTRAIT, "--checkpoint", checkpoint, "--out", tmp_path)
    run(monkeypatch, DEMO, *files, "--levels", "2")
    measured = json.loads((tmp_path / "demo.json").read_text())
    assert (measured["num_frames"], measured["first_frame"]) == (57, 3)
    assert [stage["num_blocks"] for stage in measured["stages"]] == [5] * 4
    assert measured["reaction"]["median_s"] > measured["stages"][-1]["mean_step_s"]
    assert (measured["num_levels"], measured["num_trained_levels"]) == (2, 3)
    assert frame_times(tmp_path / "demo.mp4") == pytest.approx([index / 25 for index in range(3, 60)])
    output = "".join(capsys.readouterr())
    for words in (
        "frames: 100%",
        "seconds of video",
        "time to first frame",
        "blocks/s",
        "busy",
        "mean step",
        "vae",
    ):
        assert words in output
    assert re.search(r"^denoising levels +2   of the 3 trained$", output, re.MULTILINE)
    assert re.search(r"^reaction, live +\d+\.\d\d s \((promised \d+\.\d\d s|not promised: .+)\)$", output, re.MULTILINE)


def test_the_demo_runs_at_most_the_checkpoints_levels(
    one_level: Path, wav: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ("--speech", wav, "--portrait", PORTRAIT, "--checkpoint", one_level, "--out", tmp_path)
    with pytest.raises(SystemExit, match="error: the number of levels must be 1 to 1, got 2"):
        run(monkeypatch, DEMO, *files, "--levels", "2")


def test_a_clip_is_rendered_without_transport(
    checkpoint: Path, wav: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = tmp_path / "new" / "clip.mp4"
    run(monkeypatch, RENDER, wav, PORTRAIT, video, "--checkpoint", checkpoint)
    assert frame_times(video) == pytest.approx([index / 25 for index in range(3, 60)])


@pytest.mark.parametrize("program", [DEMO, RENDER])
def test_a_file_without_audio_ends_in_one_line(
    program: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "notes.wav"
    text.write_text("no audio")
    files = ("--speech", text) if program == DEMO else (text, PORTRAIT, tmp_path / "x.mp4")
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, program, *files, "--checkpoint", checkpoint)
    message = str(ended.value.code)
    assert message.startswith("error: ")
    assert len(message.splitlines()) == 1
    assert "is not an audio file" in message


@pytest.mark.slow
def test_the_demo_speaks_a_text(
    one_level: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("AVATAR_REDIS_URL", raising=False)
    files = ("--portrait", PORTRAIT, "--checkpoint", one_level, "--out", tmp_path)
    run(monkeypatch, DEMO, *files, "--text", "Good day. " * 4, "--tts", command(tmp_path))
    measured = json.loads((tmp_path / "demo.json").read_text())
    times = frame_times(tmp_path / "demo.mp4")
    assert times == pytest.approx([index / 25 for index in range(3, 3 + measured["num_frames"])])
    assert 1.5 < measured["video_s"] < 3.0  # 36 characters of 50 ms
    assert "seconds of video" in capsys.readouterr().out
