"""Lids and gaze, frame by frame.

Rates and durations as in `training.synthetic.motion.eyes`.
"""

from dataclasses import dataclass, field
from random import Random

from avatar.audio.inputs.curves import NEVER, ease, frames, hazard
from avatar.audio.inputs.voice import Voice

# Blinks a minute, from person to person.
BLINKS = (15.0, 20.0)
# Factors of the rate after the end of a phrase, and where gaze or head jump, and for so many frames.
AT_PHRASE_END, PHRASE_END_FRAMES = 4.0, frames(0.5)
AT_JUMP, JUMP_FRAMES = 3.0, frames(0.25)
REFRACTORY_S = 0.45
# The factors' mean is learnt over this time, so that they move blinks and add none.
BOOST_S, USUAL_BOOST = 20.0, 1.5
# Fixations: where people look, as deviations of right and up in radians, and how long in seconds.
AT_VIEWER, AWAY = (0.012, 0.010), (0.20, 0.10)
VIEWER_S, AWAY_S = (0.6, 3.0), (0.4, 1.5)
# Probability that a fixation is at the viewer while the person speaks, while the other speaks, and in silence.
ATTENTION_SPEAKING, ATTENTION_LISTENING, ATTENTION_SILENT = 0.65, 0.9, 0.75
LIMIT, JUMP = 0.5, 0.06
# The share of a jump of the eyes that its first frame shows.
FIRST_FRAME = 0.9


@dataclass
class Lids:
    """The last blink: when the lids begin to close, are shut, and open; how long opening takes, and how far they close.

    boost: running mean of the factors on the rate.
    """

    start: float = NEVER
    shut: float = NEVER + 1
    opens: float = NEVER + 2
    opening: float = 1.0
    depth: float = 0.0
    boost: float = USUAL_BOOST

    def advance(self, rng: Random, frame: int, blinks: float, voices: list[Voice], jump: float) -> float:
        """Return how closed the lids are, 0 to 1. blinks: a minute. jump: when gaze or head last jumped."""
        at_end = any(frame - voice.ended < PHRASE_END_FRAMES for voice in voices)
        factor = 1 + (AT_PHRASE_END - 1) * at_end + (AT_JUMP - 1) * (frame - jump < JUMP_FRAMES)
        self.boost += (factor - self.boost) / frames(BOOST_S)
        begins = rng.random() < factor / self.boost * hazard(blinks / 60, REFRACTORY_S)
        if begins and frame - self.start >= frames(REFRACTORY_S):
            self.start = frame + rng.random()
            self.shut = self.start + frames(rng.uniform(0.07, 0.1))
            self.opens = self.shut + frames(rng.uniform(0.03, 0.07))
            self.opening = frames(rng.uniform(0.16, 0.26))
            self.depth = 1.0 if rng.random() < 0.85 else rng.uniform(0.5, 0.9)
        time = frame + 0.5
        down = ease((time - self.start) / (self.shut - self.start))
        return self.depth * (down - ease((time - self.opens) / self.opening))


@dataclass
class Gaze:
    """The direction of the eyes, in radians right and up of the viewer: now, and in this fixation.

    until: when the fixation ends. look_at: when to look at the viewer, because the other began to speak. jumped: when
    the eyes last jumped.
    """

    now: list[float] = field(default_factory=lambda: [0.0, 0.0])
    target: list[float] = field(default_factory=lambda: [0.0, 0.0])
    until: float = frames(1.0)
    look_at: float = -1.0
    jumped: float = NEVER

    def advance(self, rng: Random, frame: int, own: Voice, heard: Voice) -> tuple[float, float]:
        """Return the direction of the eyes, each within +-LIMIT."""
        is_asked = self.look_at == frame
        if is_asked or frame >= self.until:
            attention = ATTENTION_SPEAKING if own.is_speaking else ATTENTION_SILENT
            if heard.is_speaking and not own.is_speaking:
                attention = ATTENTION_LISTENING
            is_at_viewer = is_asked or rng.random() < attention
            deviation, duration_s = (AT_VIEWER, VIEWER_S) if is_at_viewer else (AWAY, AWAY_S)
            self.target = [min(max(rng.gauss(0, each), -LIMIT), LIMIT) for each in deviation]
            self.until = frame + frames(rng.uniform(*duration_s))
            if max(abs(new - old) for new, old in zip(self.target, self.now, strict=True)) > JUMP:
                self.jumped = frame
        self.now = [old + FIRST_FRAME * (new - old) for new, old in zip(self.target, self.now, strict=True)]
        return self.now[0], self.now[1]
