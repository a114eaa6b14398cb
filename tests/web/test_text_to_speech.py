"""Text to speech by a command."""

import sys
from pathlib import Path

import numpy as np
import pytest

from tests.web.page import ASSETS, speech_command
from web.playout import RATE_HZ
from web.text_to_speech import SpeechError, Synthesiser, read_sound


async def test_a_command_speaks_text_at_our_rate() -> None:
    samples = np.frombuffer(await Synthesiser(speech_command(), RATE_HZ).speak("hello"), "<i2")
    assert len(samples) == pytest.approx(RATE_HZ, rel=0.01)
    assert np.abs(samples).max() > 5000


@pytest.mark.parametrize("text", ["; touch {made}", "$(touch {made})", "`touch {made}`", "{wav}"])
async def test_text_is_one_argument_whatever_it_says(text: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    await Synthesiser(speech_command(), RATE_HZ).speak(text.replace("{made}", str(made)))
    assert not made.exists()


async def test_text_that_begins_with_a_dash_is_no_option() -> None:
    program = (
        "import shutil, sys; sys.exit(3) if sys.argv[2].startswith('-') else shutil.copy(sys.argv[1], sys.argv[3])"
    )
    command = f'{sys.executable} -c "{program}" {ASSETS / "speech.wav"} {{text}} {{wav}}'
    assert await Synthesiser(command, RATE_HZ).speak(" --output=elsewhere")


@pytest.mark.parametrize(("text", "said"), [("fail", "status 1"), ("  - ", "nothing to say")])
async def test_what_cannot_be_spoken_is_told(text: str, said: str) -> None:
    with pytest.raises(SpeechError, match=said):
        await Synthesiser(speech_command(), RATE_HZ).speak(text)


async def test_a_command_that_is_not_there_or_makes_nothing_is_told() -> None:
    with pytest.raises(SpeechError, match="cannot be run"):
        await Synthesiser("/no/such/program {text} {wav}", RATE_HZ).speak("hello")
    with pytest.raises(SpeechError, match="no sound file"):
        await Synthesiser("true {text} {wav}", RATE_HZ).speak("hello")


async def test_a_command_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("web.text_to_speech.SYNTHESIS_S", 0.05)
    with pytest.raises(SpeechError, match="longer than"):
        await Synthesiser("sh -c 'sleep 60' {text} {wav}", RATE_HZ).speak("hello")


def test_a_command_must_name_text_and_file() -> None:
    with pytest.raises(ValueError, match="must contain"):
        Synthesiser("flite -t {text}", RATE_HZ)


def test_any_sound_file_becomes_mono_at_our_rate() -> None:
    assert len(read_sound(ASSETS / "speech.wav", RATE_HZ)) / 2 / RATE_HZ == pytest.approx(8.95, abs=0.1)
