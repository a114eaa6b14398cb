"""Pose of the head, frame by frame: sway, changes of position, beats of the own speech, and nods to the other's.

Angles are pitch (positive looks down), yaw (positive to the right of the picture) and roll, in radians from the pose in
the picture. Sizes, rates and reactions as in `training.synthetic.motion.head_pose`.
"""

import math
from dataclasses import dataclass, field
from random import Random

from avatar.audio.inputs.curves import NEVER, ease, frames, hazard, swell
from avatar.audio.inputs.voice import Voice

# Standard deviations of sway, and its components: time scale in seconds and share.
SWAY = (0.03, 0.045, 0.018)
COMPONENTS = ((0.07, 0.08), (0.16, 0.2), (0.45, 0.5), (1.5, 0.84))
# Rate of changes of position, their deviations, and how long one takes in seconds.
SHIFT_HZ, SHIFT, SHIFT_S, SHIFT_REFRACTORY_S = 0.3, (0.05, 0.11, 0.035), (0.35, 0.9), 1.0
# The share of the last position that a new one keeps, so that positions do not pile up.
SHIFT_KEPT = 0.3
# Less of both while listening, which shows after this time.
LISTENING, CALM_S = 0.6, 0.25
LIMIT = (0.3, 0.42, 0.22)
# A beat: its probability at a loud syllable, least loudness, size, and its rise and fall in frames.
BEAT_PROBABILITY, BEAT_LOUDNESS, BEAT, BEAT_RISE, BEAT_FALL = 0.45, 0.35, (0.012, 0.035), frames(0.1), frames(0.15)
NOD_PROBABILITY, NOD_DIPS = 0.8, (0.45, 0.4, 0.15)
NUM_BEATS, NUM_DIPS = 3, 6


@dataclass(frozen=True)
class Manner:
    """The traits of a person: strength of beats; height in radians and rate in Hz of nods."""

    beats: float
    nod: float
    nod_hz: float


@dataclass
class HeadPose:
    """The running state of the head.

    sway: two stages of a low-pass filter of noise per component and axis. last, target: positions, and `moved`,
    `duration`: when the head began to move to the target and for how long. calm: 0 to 1 while listening.
    beats: start and height of the last ones. dips: start, half duration and height of the last nods' dips. nod_at: when
    the next nod is due.
    """

    sway: list[float] = field(default_factory=lambda: [0.0] * (2 * 3 * len(COMPONENTS)))
    last: list[float] = field(default_factory=lambda: [0.0] * 3)
    target: list[float] = field(default_factory=lambda: [0.0] * 3)
    moved: float = NEVER
    duration: float = 1.0
    calm: float = 0.0
    beats: list[float] = field(default_factory=lambda: [NEVER, 0.0] * NUM_BEATS)
    dips: list[float] = field(default_factory=lambda: [NEVER, 1.0, 0.0] * NUM_DIPS)
    nod_at: float = -1.0

    def advance(self, rng: Random, frame: int, manner: Manner, own: Voice, heard: Voice) -> tuple[float, float, float]:
        """Return pitch, yaw and roll, each within +-LIMIT."""
        is_listening = heard.is_speaking and not own.is_speaking
        self.calm += (is_listening - self.calm) / frames(CALM_S)
        share = 1 - (1 - LISTENING) * self.calm
        moving = zip(self._swayed(rng), self._shifted(rng, frame), strict=True)
        pose = [share * (sway + position) for sway, position in moving]
        if own.is_speaking and own.before > max(own.loud, BEAT_LOUDNESS) and rng.random() < BEAT_PROBABILITY:
            self.beats = [*self.beats[2:], frame + rng.uniform(-1, 1), manner.beats * rng.uniform(*BEAT)]
        if frame == self.nod_at and not own.is_speaking:
            self._start_nod(rng, frame, manner)
        time = frame + 0.5
        for start, height in zip(self.beats[::2], self.beats[1::2], strict=True):
            pose[0] += height * swell(time, start, BEAT_RISE, 0.0, BEAT_FALL)
        dips = zip(self.dips[::3], self.dips[1::3], self.dips[2::3], strict=True)
        pose[0] += max(height * swell(time, start, half, 0.0, half) for start, half, height in dips)
        pitch, yaw, roll = (limit * math.tanh(angle / limit) for angle, limit in zip(pose, LIMIT, strict=True))
        return pitch, yaw, roll

    def _swayed(self, rng: Random) -> list[float]:
        """Advance the sway: white noise through two low-pass filters a component, whose output is smooth."""
        angles = [0.0] * 3
        for number, (tau_s, part) in enumerate(COMPONENTS):
            # The curvature at 0 of its autocorrelation is that of noise blurred by a Gaussian of deviation tau.
            kept = math.exp(-1 / (math.sqrt(2) * frames(tau_s)))
            size = (1 + kept) / math.sqrt(1 + kept**2)
            for axis in range(3):
                at = 2 * (3 * number + axis)
                first = kept * self.sway[at] + math.sqrt(1 - kept**2) * rng.gauss(0, 1)
                second = kept * self.sway[at + 1] + (1 - kept) * first
                self.sway[at : at + 2] = first, second
                angles[axis] += SWAY[axis] * part * size * second
        return angles

    def _shifted(self, rng: Random, frame: int) -> list[float]:
        """Advance the position, which is eased to a target and stays there until the next."""
        progress = ease((frame + 0.5 - self.moved) / self.duration)
        now = [old + progress * (new - old) for old, new in zip(self.last, self.target, strict=True)]
        is_free = frame - self.moved >= frames(SHIFT_REFRACTORY_S)
        if rng.random() < hazard(SHIFT_HZ, SHIFT_REFRACTORY_S) and is_free:
            self.last = now
            self.target = [SHIFT_KEPT * old + rng.gauss(0, size) for old, size in zip(now, SHIFT, strict=True)]
            self.moved, self.duration = float(frame), frames(rng.uniform(*SHIFT_S))
        return now

    def _start_nod(self, rng: Random, frame: int, manner: Manner) -> None:
        """Start a nod of one to three dips, each smaller than the last."""
        start, half, height = float(frame), frames(0.5 / manner.nod_hz), manner.nod * rng.uniform(0.75, 1.25)
        [count] = rng.choices((1, 2, 3), NOD_DIPS)
        for _ in range(count):
            self.dips = [*self.dips[3:], start, half, height]
            start += 2 * half
            height *= rng.uniform(0.45, 0.75)
