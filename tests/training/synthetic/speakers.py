"""Speech and engines for tests, in place of real voices."""

from pathlib import Path

import numpy as np

from training.data import AUDIO_RATE_HZ
from training.synthetic.speech.voices import PAUSE, Engines, Speech, Voice


def speech_of(*phones: tuple[str, float], duration_s: float = 2.0) -> Speech:
    """Return phones with their onsets, over a tone."""
    time = np.arange(round(duration_s * AUDIO_RATE_HZ)) / AUDIO_RATE_HZ
    tone = np.sin(2 * np.pi * 200 * time).astype(np.float32)
    return Speech(tone, [onset for _, onset in phones], [phone for phone, _ in phones])


class Babbler(Engines):
    """Engines that speak every text in syllables of 0.2 s, and pause for 0.1 s after it."""

    def __init__(self) -> None:
        super().__init__(Path("none"), seed=0)
        self.texts: list[str] = []

    def speak(self, text: str, voice: Voice, tempo: float = 1.0, pitch: float = 1.0) -> Speech:  # noqa: ARG002
        self.texts.append(text)
        syllables = max(2, len(text) // 6)
        onsets = [0.1 * index for index in range(2 * syllables)]
        time = np.arange(round(0.2 * syllables * AUDIO_RATE_HZ)) / AUDIO_RATE_HZ
        loud = 0.2 + 0.1 * np.sin(2 * np.pi * 5 * time) + 0.05 * np.sin(2 * np.pi * 1.1 * time)
        pause = np.zeros(AUDIO_RATE_HZ // 10)
        samples = np.concatenate([loud * np.sign(np.sin(2 * np.pi * 150 * time)), pause]).astype(np.float32)
        return Speech(samples, [*onsets, 0.2 * syllables], [*("b", "ɑ") * syllables, PAUSE])
