"""Dialogues of two people: turns, overlaps and pauses, with the phones of both.

A clip shows the person; the other is only heard. Depending on its kind, the person speaks alone, only listens, takes
turns with the other, or speaks at the same time.

Axes: s samples at 16 kHz.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from training.data import AUDIO_RATE_HZ
from training.synthetic.speech.sentences import sentence
from training.synthetic.speech.voices import PAUSE, Engines, Speech, Voice, choose_voice, is_pause

# The kinds of ten consecutive clips: whatever number of clips is used, it is a good mixture.
KINDS = ("speak", "listen", "turns", "speak", "listen", "turns", "speak", "listen", "overlap", "turns")
# Pauses between the sentences of one speaker, and between two speakers; negative is an overlap.
PAUSES_S = (0.0, 0.1, 0.3, 0.5, 0.8)
GAP_S, GAP_DEVIATION_S, GAP_RANGE_S = 0.25, 0.3, (-0.3, 1.0)
# A shorter pause does not end a phrase.
PHRASE_PAUSE_S = 0.15
# Share of the training clips with a second voice in which it is not heard.
DROPPED = 0.2

# Speaks one more sentence: the speech, and its text.
Speak = Callable[[], tuple[Speech, str]]


@dataclass(eq=False)
class Track:
    """The speech of one person in a clip, sentence by sentence."""

    onsets: list[float] = field(default_factory=lambda: [0.0])
    phones: list[str] = field(default_factory=lambda: [PAUSE])
    texts: list[str] = field(default_factory=list)
    sentences: list[tuple[float, Speech]] = field(default_factory=list)
    end: float = 0.0

    def say(self, start: float, speak: Speak) -> None:
        """Append a sentence at a time in seconds, no earlier than the end of the last one."""
        start = max(start, self.end)
        speech, text = speak()
        self.texts.append(text)
        self.sentences.append((start, speech))
        self.end = start + len(speech.samples) / AUDIO_RATE_HZ
        self.onsets += [start + onset for onset in speech.onsets] + [self.end]
        self.phones += [*speech.phones, PAUSE]

    def speech(self, duration_s: float, peak: float) -> Speech:
        """Return the speech, cut to a duration. peak: of the samples, in [0, 1]."""
        samples = np.zeros(round(duration_s * AUDIO_RATE_HZ), np.float32)
        for start, part in self.sentences:
            first = round(start * AUDIO_RATE_HZ)
            heard = part.samples[: max(0, len(samples) - first)]
            samples[first : first + len(heard)] += heard
        samples *= peak / max(float(np.abs(samples).max(initial=0)), 1e-3)
        kept = sum(onset < duration_s for onset in self.onsets)
        return Speech(samples, self.onsets[:kept], self.phones[:kept])


@dataclass(frozen=True, eq=False)
class Dialogue:
    """The speech of the person and of the other in a clip; both speeches have the clip's length.

    kind: one of KINDS. texts: of the person and of the other.
    """

    kind: str
    person: Speech
    other: Speech
    texts: tuple[str, str]


def speaker(engines: Engines, voice: Voice, is_held_out: bool, rng: Generator) -> Speak:
    """Return a speaker of random sentences, with a tempo and a pitch of its own."""
    text_rng = random.Random(int(rng.integers(1 << 62)))
    tempo = rng.uniform(0.9, 1.15)
    pitch = rng.uniform(0.95, 1.05) if voice.engine == "espeak" else rng.uniform(0.86, 1.18)

    def speak() -> tuple[Speech, str]:
        text = sentence(text_rng, is_held_out)
        return engines.speak(text, voice, tempo, pitch), text

    return speak


def talk(track: Track, speak: Speak, duration_s: float, rng: Generator) -> None:
    """Fill a track with sentences and pauses."""
    start = rng.uniform(0, 0.5)
    while start < duration_s:
        track.say(start, speak)
        start = track.end + rng.choice(PAUSES_S)


def take_turns(tracks: list[Track], speak: list[Speak], duration_s: float, rng: Generator) -> None:
    """Fill two tracks with turns of one or two sentences each."""
    turn, start = int(rng.integers(2)), rng.uniform(0, 0.5)
    while start < duration_s:
        track = tracks[turn % 2]
        track.say(start, speak[turn % 2])
        if rng.random() < 0.3:
            track.say(track.end + rng.choice(PAUSES_S), speak[turn % 2])
        start = max(0.0, track.end + float(np.clip(rng.normal(GAP_S, GAP_DEVIATION_S), *GAP_RANGE_S)))
        turn += 1


def make_dialogue(
    engines: Engines, voices: tuple[Voice, Voice], kind: str, duration_s: float, is_held_out: bool, rng: Generator
) -> Dialogue:
    """Speak a dialogue of a kind and a duration, by the voices of the person and of the other."""
    tracks = [Track(), Track()]
    speak = [speaker(engines, voice, is_held_out, rng) for voice in voices]
    if kind == "turns":
        take_turns(tracks, speak, duration_s, rng)
    if kind in ("speak", "overlap"):
        talk(tracks[0], speak[0], duration_s, rng)
    if kind in ("listen", "overlap"):
        talk(tracks[1], speak[1], duration_s, rng)
    person, other = (track.speech(duration_s, rng.uniform(0.3, 0.9)) for track in tracks)
    return Dialogue(kind, person, other, (" ".join(tracks[0].texts), " ".join(tracks[1].texts)))


def choose_voices(rng: Generator, is_held_out: bool) -> tuple[Voice, Voice]:
    """Draw two different voices of a split."""
    person = choose_voice(rng, is_held_out)
    while (other := choose_voice(rng, is_held_out)) == person:
        pass
    return person, other


def phrases(speech: Speech) -> list[tuple[float, float]]:
    """Return start and end (seconds) of what is spoken between pauses."""
    ends = [*speech.onsets[1:], len(speech.samples) / AUDIO_RATE_HZ]
    spans: list[tuple[float, float]] = []
    for start, end, phone in zip(speech.onsets, ends, speech.phones, strict=True):
        if is_pause(phone) or end <= start:
            continue
        if spans and start - spans[-1][1] < PHRASE_PAUSE_S:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
    return spans


def speaking(speech: Speech, times: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
    """Return at which times (f,) in seconds a phrase is spoken: (f,) bool."""
    within = [(start <= times) & (times < end) for start, end in phrases(speech)]
    spoken: NDArray[np.bool_] = np.any(within or [times < 0], axis=0)
    return spoken
