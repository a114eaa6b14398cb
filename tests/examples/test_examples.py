"""Every example in Python, run as its docstring describes."""

import asyncio
import re
import sys
import wave
from pathlib import Path

import av
import numpy as np
import pytest

from avatar.settings import GatewaySettings
from avatar.store.sessions import SessionStore
from services.local.suite import suite
from tests.conftest import RATE_HZ, write_speech
from tests.readers import GENERATED

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def wav(tmp_path: Path) -> str:
    """A WAV file of a second and a half: stereo of 24 bits."""
    with wave.open(str(write_speech(tmp_path / "mono.wav", 1.5))) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype("<i4") << 8
    path = tmp_path / "speech.wav"
    with wave.open(str(path), "w") as file:
        file.setparams((2, 3, RATE_HZ, 0, "NONE", ""))
        file.writeframes(np.repeat(samples, 2).view("u1").reshape(-1, 4)[:, :3].tobytes())
    return str(path)


@pytest.fixture
def portrait(tmp_path: Path, picture: bytes) -> str:
    path = tmp_path / "face.png"
    path.write_bytes(picture)
    return str(path)


async def run(name: str, *flags: str, status: int = 0) -> str:
    """Run an example, expect its exit status, and return its output."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(EXAMPLES / name), *flags, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode == status, output.decode()
    return output.decode()


async def test_a_wav_becomes_an_mp4(gateway: str, wav: str, portrait: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out.mp4"
    printed = await run("wav_to_mp4.py", wav, portrait, str(out), "--target", gateway, "--seed", "7")
    assert "45 frames of 64 x 64" in printed
    with av.open(str(out)) as film:
        times = [frame.time for frame in film.decode(video=0)]
    with av.open(str(out)) as film:
        num_samples = sum(frame.samples for frame in film.decode(audio=0))
        assert GENERATED in film.metadata["comment"]
    assert times == pytest.approx([index / 25 for index in range(3, 48)], abs=1e-3)
    assert num_samples == pytest.approx(1.5 * 48000, abs=2048)


async def test_a_microphone_is_interrupted(gateway: str, wav: str, portrait: str) -> None:
    printed = await run("live_microphone.py", wav, portrait, "--target", gateway, "--interrupt-after", "1")
    assert re.search(r"^Interrupted\(.*was_speaking=True", printed, re.MULTILINE)
    assert printed.count("PlaybackStarted") in (1, 2), "the interrupt may precede the first turn's first frame"
    assert printed.count("was_interrupted=True") == printed.count("was_interrupted=False") == 1


async def test_a_microphone_talks_to_an_avatar_that_listens(
    listening_checkpoint: Path, store: SessionStore, wav: str, portrait: str
) -> None:
    async with suite(listening_checkpoint, store, GatewaySettings(listen="127.0.0.1:0")) as target:
        printed = await run("live_microphone.py", wav, portrait, "--target", target, "--talk")
    assert re.fullmatch(r"\{'idle': \d+\} frames in total", printed.splitlines()[-1])


async def test_many_sessions_speak_at_once(gateway: str, wav: str, portrait: str) -> None:
    printed = await run("many_sessions.py", wav, portrait, "--target", gateway, "--sessions", "3")
    assert re.findall(r"session (\d): 45 frames", "\n".join(sorted(printed.splitlines()))) == ["0", "1", "2"]


async def test_a_file_that_is_no_wav_is_refused_in_a_line(portrait: str, tmp_path: Path) -> None:
    mp3 = tmp_path / "speech.mp3"
    mp3.write_bytes(b"ID3\x03" + bytes(1000))
    out = str(tmp_path / "out.mp4")
    printed = await run("wav_to_mp4.py", str(mp3), portrait, out, "--target", "127.0.0.1:1", status=1)
    assert printed.startswith(f"error: {mp3} is no WAV file, but MP3")


async def test_a_rate_that_aac_lacks_is_resampled(gateway: str, portrait: str, tmp_path: Path) -> None:
    speech, out = tmp_path / "speech.wav", tmp_path / "out.mp4"
    with wave.open(str(speech), "w") as file:
        file.setparams((1, 2, 12345, 0, "NONE", ""))
        file.writeframes(bytes(2 * 12345))
    await run("wav_to_mp4.py", str(speech), portrait, str(out), "--target", gateway)
    with av.open(str(out)) as film:
        num_samples = sum(frame.samples for frame in film.decode(audio=0))
    assert num_samples == pytest.approx(48000, abs=2048)


@pytest.mark.parametrize("name", ["out", "out.txt", "folder.mp4", "speech.wav/out.mp4"])
async def test_a_name_that_is_no_films_is_refused_before_the_call(
    wav: str, portrait: str, tmp_path: Path, name: str
) -> None:
    (tmp_path / "folder.mp4").mkdir()
    printed = await run("wav_to_mp4.py", wav, portrait, str(tmp_path / name), "--target", "127.0.0.1:1", status=1)
    assert re.fullmatch(rf"error: .*{name.split('/')[0]}.*\n", printed)
    assert "connect" not in printed


@pytest.mark.parametrize("name", ["wav_to_mp4.py", "many_sessions.py", "live_microphone.py"])
async def test_a_missing_gateway_is_reported_in_a_line(wav: str, portrait: str, tmp_path: Path, name: str) -> None:
    out = [str(tmp_path / "out.mp4")] if name == "wav_to_mp4.py" else []
    printed = await run(name, wav, portrait, *out, "--target", "127.0.0.1:1", status=1)
    assert re.fullmatch(r"error: .*; is a gateway running there\? `python -m services` starts one .*\n", printed)


@pytest.mark.parametrize("name", ["many_sessions.py", "live_microphone.py"])
async def test_a_refusal_is_reported_in_a_line(gateway: str, wav: str, tmp_path: Path, name: str) -> None:
    (tmp_path / "face.txt").write_text("no picture")
    printed = await run(name, wav, str(tmp_path / "face.txt"), "--target", gateway, status=1)
    assert re.fullmatch(r"error: picture: .*\n", printed)
