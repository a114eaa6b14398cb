"""Tests of the speech engines: a command, and an OpenAI-compatible endpoint."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avatar.errors import VoiceFailed
from avatar.settings import VoiceSettings
from services.voice.__main__ import open_voice
from services.voice.endpoint import Endpoint
from services.voice.engines import Command, Engine
from services.voice.sound import Samples
from tests.services.voice.fakes import COMMAND, FakeEndpoint, command, spoken

KEY = "sk-secret"
WRITE_WORDS = "\nopen(path.replace('speech.wav', 'words.txt'), 'w').write('{}')"


async def speak(engine: Engine, text: str, language: str = "") -> Samples:
    async with aclosing(engine.speak(text, language)) as sounds:
        return np.concatenate([sound.samples async for sound in sounds])


@pytest.mark.parametrize("text", ["Hello.", "-o x; touch /tmp/$(id) `id` 'a' \"b\"", "{wav} {language}", "ä€"])
async def test_a_command_gets_the_text_as_one_argument(tmp_path: Path, text: str) -> None:
    samples = await speak(Command(command(tmp_path), (), 10), text)
    heard = (samples.reshape(-1, 800)[:, 0] * 32768 - 40 * 256).astype(int).tolist()
    expected = f" {text}" if text.startswith("-") else text
    assert heard == [ord(each) % 256 for each in expected]


async def test_a_command_gets_the_language_and_may_say_the_times_of_words(tmp_path: Path) -> None:
    program = COMMAND + "\nopen(sys.argv[3], 'w').write('0.05\\n0.5\\n')\nassert sys.argv[4] == 'pt-BR'"
    engine = Command(command(tmp_path, program, "{text} {wav} {words} {language}"), (), 10)
    async with aclosing(engine.speak("Bom dia.", "pt-BR")) as sounds:
        (sound,) = [each async for each in sounds]
    assert sound.words_s == [0.05, 0.5]
    assert sound.is_last


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("raise SystemExit(3)", "status 3"),
        ("", "no WAV file"),
        ("import sys; open(sys.argv[2], 'w').write('Hello, this is no sound')", "no WAV file"),
        ("import sys; open(sys.argv[2], 'w').write('RIFF')", "no WAV file"),
        ("import os, sys; os.mkfifo(sys.argv[2])", "speech.wav no regular file"),
        ("import os, sys; os.symlink('/dev/zero', sys.argv[2])", "speech.wav no regular file"),
        (COMMAND + "\nimport os; os.mkfifo(path.replace('speech.wav', 'words.txt'))", "words.txt no regular file"),
        (COMMAND + WRITE_WORDS.format("soon"), "no numbers"),
        (COMMAND + WRITE_WORDS.format("nan"), "not seconds"),
        (COMMAND + WRITE_WORDS.format("-0.5"), "not seconds"),
        (COMMAND + WRITE_WORDS.format("inf"), "not seconds"),
    ],
)
async def test_a_command_that_makes_no_sound_fails(tmp_path: Path, program: str, message: str) -> None:
    with pytest.raises(VoiceFailed, match=message):
        await speak(Command(command(tmp_path, program), (), 10), "Hello.")


async def test_a_command_that_can_no_longer_be_run_fails(tmp_path: Path) -> None:
    program = tmp_path / "speak"
    program.touch(mode=0o700)
    engine = Command(f"{program} {{text}} {{wav}}", (), 10)
    program.unlink()
    with pytest.raises(VoiceFailed, match="cannot be run: No such file"):
        await speak(engine, "Hello.")


async def test_a_command_that_takes_too_long_fails(tmp_path: Path) -> None:
    program = "import time; time.sleep(60)"
    with pytest.raises(VoiceFailed, match=r"took longer than 0.2 s"):
        await speak(Command(command(tmp_path, program), (), 0.2), "Hello.")


async def test_a_command_that_is_interrupted_ends_with_its_processes(tmp_path: Path) -> None:
    program = f"""
import pathlib, subprocess, sys
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
pathlib.Path({str(tmp_path / "pid")!r}).write_text(f"{{child.pid}}.")
child.wait()
"""
    pid = tmp_path / "pid"
    speaking = asyncio.ensure_future(speak(Command(command(tmp_path, program), (), 60), "Hello."))
    async with asyncio.timeout(20):
        while not (pid.exists() and pid.read_text().endswith(".")):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        speaking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await speaking
        while is_running(int(pid.read_text()[:-1])):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def is_running(pid: int) -> bool:
    """Return whether a process runs; not one whose status nobody has taken yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("true", "{text} and {wav}"),
        ("true -t {text}", "{wav}"),
        ("true -o {wav}", "{text}"),
        (" ", "{text} and {wav}"),
        ("true '{text} {wav}", "balanced quotes"),
        ("/nowhere/speak {text} {wav}", "there is no executable '/nowhere/speak'"),
        ("/etc/passwd {text} {wav}", "there is no executable"),
    ],
)
async def test_a_command_that_cannot_speak_is_refused_at_the_start(line: str, expected: str) -> None:
    with pytest.raises(ValueError, match="AVATAR_VOICE_COMMAND is") as refusal:
        async with open_voice(VoiceSettings(voice_command=line)):
            pass
    assert expected in str(refusal.value)


@asynccontextmanager
async def endpoint(folder: Path, **settings: Any) -> AsyncGenerator[tuple[Endpoint, FakeEndpoint], None]:
    key, fake = folder / "key", FakeEndpoint()
    key.write_text(f"{KEY}\n")
    async with fake.serving() as url:
        engine = Endpoint(url, key, "tts-1", "alloy", (), settings.get("timeout_s", 10.0))
        async with engine:
            yield engine, fake


async def test_an_endpoint_is_asked_as_openai_is(tmp_path: Path) -> None:
    async with endpoint(tmp_path) as (engine, fake):
        samples = await speak(engine, "Hello.", "en")
        np.testing.assert_allclose(samples, spoken("Hello.", 24000), atol=1e-4)
        assert fake.requests == [{"model": "tts-1", "voice": "alloy", "input": "Hello.", "response_format": "pcm"}]
        (tmp_path / "key").write_text("sk-another")  # read again
        await speak(engine, "Hello.")
        assert fake.keys == [f"Bearer {KEY}", "Bearer sk-another"]


async def test_an_endpoints_sound_is_given_out_before_it_is_complete(tmp_path: Path) -> None:
    async with endpoint(tmp_path) as (engine, fake):
        fake.after_first_part = asyncio.Event()
        async with aclosing(engine.speak("Hello.", "")) as sounds, asyncio.timeout(10):
            first = await anext(sounds)
            assert 0 < len(first.samples) <= 2400
            fake.after_first_part.set()
            rest = sum([len(each.samples) async for each in sounds])
    assert len(first.samples) + rest == len(spoken("Hello.", 24000))


@pytest.mark.parametrize("kind", ["audio/pcm;rate=16000", "audio/L16; rate=16000; channels=1"])
async def test_an_endpoint_may_name_its_rate(tmp_path: Path, kind: str) -> None:
    async with endpoint(tmp_path) as (engine, fake):
        fake.content_type = kind
        async with aclosing(engine.speak("Hello.", "")) as sounds:
            assert {each.rate_hz async for each in sounds} == {16000}


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (401, "", r"refuses the key \(status 401\)"),
        (404, "", "has no such path, model or voice"),
        (429, "", "takes no more requests now"),
        (503, "", r"fails \(status 503\)"),
        (302, "", r"fails \(status 302\)"),
        (200, "audio/mpeg", "sends audio/mpeg, expected audio/pcm or audio/wav"),
        (200, "audio/wav", "no WAV file"),
        (200, "audio/pcm;rate=1", "1 Hz"),
        (200, "audio/pcm;rate=" + "9" * 5000, "0 Hz, expected 8000"),
        (200, "audio/L16;channels=2", "several channels"),
    ],
)
async def test_an_endpoints_refusal_is_explained_without_the_text_and_the_key(
    tmp_path: Path, status: int, kind: str, message: str
) -> None:
    async with endpoint(tmp_path) as (engine, fake):
        fake.status, fake.content_type = status, kind
        with pytest.raises(VoiceFailed, match=message) as failure:
            await speak(engine, "Hello.")
    assert "Hello" not in str(failure.value)
    assert KEY not in str(failure.value)


async def test_an_endpoint_that_stops_or_is_slow_fails(tmp_path: Path) -> None:
    async with endpoint(tmp_path, timeout_s=0.3) as (engine, fake):
        fake.after_first_part, started_s = asyncio.Event(), time.monotonic()
        with pytest.raises(VoiceFailed, match=r"sends no sound for 0.3 s"):
            await speak(engine, "Hello.")
        assert time.monotonic() - started_s >= 0.3
        fake.after_first_part.set()
        fake.is_cut_short = True
        with pytest.raises(VoiceFailed, match="fails: Client"):
            await speak(engine, "Hello.")


async def test_an_endpoint_may_take_longer_than_the_timeout_if_it_goes_on(tmp_path: Path) -> None:
    async with endpoint(tmp_path, timeout_s=0.6) as (engine, fake):
        fake.part_bytes, fake.pause_s = 800, 0.06
        started_s = time.monotonic()
        assert len(await speak(engine, "Hello.")) == len(spoken("Hello.", 24000))
        assert time.monotonic() - started_s > 0.6


async def test_an_endpoint_speaks_more_turns_than_a_pool_of_connections_has(tmp_path: Path) -> None:
    async with endpoint(tmp_path) as (engine, fake), asyncio.timeout(20):
        fake.after_first_part = asyncio.Event()
        speaking = [asyncio.ensure_future(speak(engine, "Hello.")) for _ in range(101)]
        while len(fake.requests) < len(speaking):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        fake.after_first_part.set()
        await asyncio.gather(*speaking)


async def test_an_endpoint_that_is_not_there_fails() -> None:
    async with Endpoint("http://127.0.0.1:1/v1", None, "tts-1", "alloy", (), 5) as engine:
        with pytest.raises(VoiceFailed, match="fails: ClientConnectorError"):
            await speak(engine, "Hello.")


@pytest.mark.parametrize("text", ["", "two words", "ä"])
def test_a_file_without_a_key_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "key").write_text(text)
    with pytest.raises(ValueError, match="key"):
        Endpoint("https://example.com", tmp_path / "key", "tts-1", "alloy", (), 5)


def test_a_key_is_not_sent_to_another_machine_in_plain_text(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY)
    with pytest.raises(ValueError, match="in plain text"):
        Endpoint("http://example.com/v1", tmp_path / "key", "tts-1", "alloy", (), 5)
    Endpoint("http://127.0.0.1:8000/v1", tmp_path / "key", "tts-1", "alloy", (), 5)


@pytest.mark.parametrize("fields", [{}, {"voice_url": "http://a/v1", "voice_command": "b {text} {wav}"}])
async def test_a_voice_has_one_engine(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="set one of AVATAR_VOICE_URL and AVATAR_VOICE_COMMAND"):
        async with open_voice(VoiceSettings(**fields)):
            pass
