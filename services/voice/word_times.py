"""Times of the words of a sentence in its speech: the engine's, or an estimate by the length of the words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from services.voice.sentences import Sentence, Word

# Weights of an estimate: a word counts as its characters and one more, a pause at punctuation as so many.
PAUSES = {",": 3, ";": 4, ":": 4, "—": 4, ".": 5, "!": 5, "?": 5, "…": 6}
# Seconds of a weight before any sentence was spoken: 15 characters a second.
FIRST_WEIGHT_S = 1 / 15
# Share of the latest sentence in the speed of the next one.
SMOOTHING = 0.5


@dataclass(frozen=True)
class TimedWord:
    """A word and its start in the sentence's speech, in seconds."""

    word: Word
    start_s: float
    is_estimated: bool


class Speed:
    """The speed of a voice. weight_s: seconds of one weight, as of the latest sentences."""

    def __init__(self) -> None:
        self.weight_s = FIRST_WEIGHT_S

    def add(self, weight: float, seconds: float) -> None:
        """Count a sentence."""
        if weight:
            self.weight_s += SMOOTHING * (seconds / weight - self.weight_s)


class WordTimes:
    """The words of one sentence, each given out once, with the speech that it begins in."""

    def __init__(self, sentence: Sentence, speed: Speed) -> None:
        self._words = sentence.words()
        self._speed = speed
        self._starts: list[float] = []  # weights before each word
        self._weight = 0.0
        for word in self._words:
            self._starts.append(self._weight)
            self._weight += len(word.text) + 1 + PAUSES.get(word.text[-1], 0)
        self._known_s: dict[int, float] = {}
        self._num_given = 0
        self._last_s = 0.0

    def know(self, starts_s: Sequence[float]) -> None:
        """Take over the engine's times of the next words of which it has given none, in seconds."""
        for start_s in starts_s:
            self._known_s[len(self._known_s)] = start_s

    def until(self, end_s: float, total_s: float | None = None) -> list[TimedWord]:
        """Return the further words that begin before `end_s`.

        end_s: end of the speech that is given out with them. total_s: duration of the whole sentence, if it is known.
        """
        weight_s = self._speed.weight_s if total_s is None else total_s / (self._weight or 1.0)
        given = []
        for at in range(self._num_given, len(self._words)):
            known_s = self._known_s.get(at)
            start_s = self._starts[at] * weight_s if known_s is None else known_s
            if start_s >= end_s:
                break
            # Words that an estimate had put too late belong to speech that was given out before.
            self._last_s = max(self._last_s, start_s)
            given.append(TimedWord(self._words[at], self._last_s, known_s is None))
        self._num_given += len(given)
        return given

    def finish(self, total_s: float) -> list[TimedWord]:
        """Return the words that are left, and learn the speed. total_s: duration of the sentence."""
        self._known_s = {at: min(known_s, total_s) for at, known_s in self._known_s.items()}
        left = self.until(math.inf, total_s)
        self._speed.add(self._weight, total_s)
        return left
