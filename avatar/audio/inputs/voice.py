"""Phrases of a voice, from the loudness of its frames.

Axes: s samples at 16 kHz, f pixel frames.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from avatar.audio.alignment import SAMPLE_RATE_HZ
from avatar.audio.inputs.curves import NEVER, frames
from avatar.types import FRAME_RATE_HZ

# Levels (root mean square, full scale 1) below the first are silence. A frame is speech from this share of the peak on,
# which falls by a factor e in so many seconds. With a share of 0.12 half of the phrases ended within a word, at its
# stops and quiet consonants.
QUIET, SPEECH_SHARE, PEAK_S = 0.01, 0.04, 10.0
# A shorter pause does not end a phrase, and a shorter sound begins none.
PAUSE, SHORTEST_PHRASE = math.ceil(frames(0.15)), round(frames(0.12))


def levels(samples: Tensor) -> list[float]:
    """Return the root mean square of each pixel frame of samples (s,) at 16 kHz: f values."""
    squares: Tensor = samples.double().square().reshape(-1, SAMPLE_RATE_HZ // FRAME_RATE_HZ).mean(1)
    return [float(level) for level in squares.sqrt()]


@dataclass
class Voice:
    """The running state of a voice.

    peak: recent loudest level. spoken, silent: frames of speech in the current phrase, and since speech. began, ended:
    when the last phrase began, and ended, which shows only after a pause. loud, before: levels of the last two frames
    over the peak.
    """

    peak: float = QUIET
    spoken: float = 0.0
    silent: float = 0.0
    began: float = NEVER
    ended: float = NEVER
    loud: float = 0.0
    before: float = 0.0

    def advance(self, frame: int, level: float) -> None:
        """Take the level of a frame."""
        self.peak = max(self.peak * (1 - 1 / frames(PEAK_S)), level, QUIET)
        self.before, self.loud = self.loud, level / self.peak
        if level >= max(QUIET / 2, SPEECH_SHARE * self.peak):
            self.spoken, self.silent = self.spoken + 1, 0.0
            if self.spoken == SHORTEST_PHRASE:
                self.began = frame - self.spoken + 1
        else:
            self.silent += 1
            if self.silent >= PAUSE and self.spoken:
                if self.spoken >= SHORTEST_PHRASE:
                    self.ended = frame - self.silent
                self.spoken = 0.0

    @property
    def is_speaking(self) -> bool:
        return self.spoken >= SHORTEST_PHRASE

    def has_begun(self) -> bool:
        """Return True in the frame in which a phrase shows to have begun."""
        return self.spoken == SHORTEST_PHRASE and not self.silent

    def has_ended(self, frame: int) -> bool:
        """Return True in the frame in which a phrase shows to have ended."""
        return self.silent == PAUSE and self.ended == frame - PAUSE
