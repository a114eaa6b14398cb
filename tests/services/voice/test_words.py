"""The words that the local voice speaks, as a recognizer of speech reads them."""

import re
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

import numpy as np
import pytest

from avatar.rpc.channel import channel
from avatar.rpc.client import remote_voice
from avatar.rpc.server import serving
from avatar.settings import VoiceSettings
from avatar.worker.v1 import voice_pb2 as pb
from services.local.local_voice import PIPER, start_piper, voice_settings
from services.local.processes import Suite
from services.voice.__main__ import open_voice

TEXTS = (
    "Good morning, and welcome. My name is Joe. I can tell you about the weather, or the time of the next train.",
    "The meeting starts at half past nine in the large room on the second floor. Please bring your own coffee!",
    "Would you like to hear more? If not, say stop, and I will be quiet at once.",
)
LARGEST_RATE = 0.08


def word_error_rate(expected: str, heard: str) -> float:
    """Return the edits that turn the words heard into those expected, as a share of these."""
    left, right = _words(expected), _words(heard)
    row = list(range(len(right) + 1))
    for i, word in enumerate(left, 1):
        previous, row = row, [i]
        for j, other in enumerate(right, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (word != other)))
    return row[-1] / max(1, len(left))


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


@pytest.mark.slow
async def test_what_is_spoken_is_what_was_written(tmp_path: Path) -> None:
    from tests.services.voice.whisper_reader import reader  # its weights are a package of their own

    assert PIPER.exists(), f"make installs Piper in {sys.prefix}"
    settings = voice_settings()
    read, rates = reader(), []
    async with Suite(tmp_path, "", {}) as suite:
        await start_piper(suite, settings)
        fields = {name.removeprefix("AVATAR_").lower(): value for name, value in settings.items()}
        async with (
            open_voice(VoiceSettings.model_validate(fields)) as servicer,
            serving("127.0.0.1:0", servicer) as port,
            channel(f"127.0.0.1:{port}") as connection,
        ):
            for text in TEXTS:
                stage = remote_voice(connection)
                await stage.open(pb.OpenSpeak(encoding="float32", rate_hz=16000, num_channels=1, language="en"))

                async def pieces(text: str = text) -> AsyncGenerator[pb.TextPiece, None]:
                    for start in range(0, len(text), 5):
                        yield pb.TextPiece(text=text[start : start + 5])

                speech = b"".join([piece.data async for piece in stage(pieces())])
                rates.append(word_error_rate(text, read(np.frombuffer(speech, "<f4"))))
    print("word error rates:", rates)
    assert np.mean(rates) <= LARGEST_RATE


def test_a_word_error_rate_counts_edits() -> None:
    assert word_error_rate("One two, three.", "one two three") == 0.0
    assert word_error_rate("one two three four", "one too three") == 0.5
