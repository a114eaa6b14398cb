"""Text to speech by a command."""

import sys
from pathlib import Path

import numpy as np
import pytest

from tests.web.page import ASSETS, speech_command
from web.playout import RATE_HZ
from web.text_to_speech import SpeechError, Synthesiser


async def test_a_command_speaks_text_at_the_given_rate() -> None:
    samples = np.frombuffer(await Synthesiser(speech_command(), RATE_HZ).speak("hello"), "<i2")
    assert len(samples) == pytest.approx(RATE_HZ, rel=0.01)
    assert np.abs(samples).max() > 5000


@pytest.mark.parametrize("text", ["; touch {made}", "$(touch {made})", "`touch {made}`", "{wav}"])
async def test_text_is_always_one_argument(text: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    await Synthesiser(speech_command(), RATE_HZ).speak(text.replace("{made}", str(made)))
    assert not made.exists()


async def test_characters_that_no_argument_can_hold_are_dropped() -> None:
    assert await Synthesiser(speech_command(), RATE_HZ).speak("hel\0lo \ud800")
    with pytest.raises(SpeechError, match="nothing to say"):
        await Synthesiser(speech_command(), RATE_HZ).speak("\0\ud800")


async def test_text_that_starts_with_a_dash_is_no_option() -> None:
    program = (
        "import shutil, sys; sys.exit(3) if sys.argv[2].startswith('-') else shutil.copy(sys.argv[1], sys.argv[3])"
    )
    command = f'{sys.executable} -c "{program}" {ASSETS / "speech.wav"} {{text}} {{wav}}'
    assert await Synthesiser(command, RATE_HZ).speak(" --output=elsewhere")


@pytest.mark.parametrize(("text", "reason"), [("fail", "status 1"), ("  - ", "nothing to say")])
async def test_a_failure_is_reported(text: str, reason: str) -> None:
    with pytest.raises(SpeechError, match=reason):
        await Synthesiser(speech_command(), RATE_HZ).speak(text)


async def test_a_missing_command_and_a_missing_file_are_reported() -> None:
    with pytest.raises(SpeechError, match="cannot be run"):
        await Synthesiser("/no/such/program {text} {wav}", RATE_HZ).speak("hello")
    with pytest.raises(SpeechError, match="no audio file"):
        await Synthesiser("true {text} {wav}", RATE_HZ).speak("hello")


async def test_a_command_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("web.text_to_speech.SYNTHESIS_S", 0.05)
    with pytest.raises(SpeechError, match="longer than"):
        await Synthesiser("sh -c 'sleep 60' {text} {wav}", RATE_HZ).speak("hello")


def test_a_command_must_name_text_and_file() -> None:
    with pytest.raises(ValueError, match="must contain"):
        Synthesiser("flite -t {text}", RATE_HZ)
