"""Eyes: blinks at human rates, and gaze that keeps to the viewer while the head moves.

Axes: f frames at 25 Hz.
"""

from collections.abc import Sequence

import numpy as np
from numpy.random import Generator

from training.data import FRAME_RATE_HZ
from training.synthetic.head import Floats
from training.synthetic.motion.curves import arrivals, ease, frame_times, smooth

# Blinks a minute: the mean of all people, and the deviation of its logarithm from person to person.
BLINKS, BLINKS_DEVIATION = 17.5, 0.3
# Factors of the rate at the end of a phrase, and where gaze or head jump.
AT_PHRASE_END, AT_JUMP = 4.0, 3.0
REFRACTORY_S = 0.45
# Angles of the eyes in the head at a weight of 1 of the pack's shapes: sideways, up, down.
LOOK_SIDEWAYS, LOOK_UP, LOOK_DOWN = 0.264, 0.171, 0.198
# Fixations: where people look, as deviations of right and up in radians, and how long.
AT_VIEWER, AWAY = (0.012, 0.010), (0.20, 0.10)
FIXATION_S = {"viewer": (0.6, 3.0), "away": (0.4, 1.5)}


def near(times: Floats, moments: Sequence[float], before_s: float, after_s: float) -> Floats:
    """Return which times (f,) lie near one of the moments: (f,) of 0 or 1."""
    close = [(times > moment - before_s) & (times < moment + after_s) for moment in moments]
    flags: Floats = np.any(close or [times < 0], axis=0).astype(float)
    return flags


def blink_times(rng: Generator, num_frames: int, ends: Sequence[float], jumps: Sequence[float]) -> list[float]:
    """Draw when the lids begin to close, in seconds.

    ends: of phrases, own and heard. jumps: when gaze or head jump.
    """
    times = frame_times(num_frames)
    boost = 1 + (AT_PHRASE_END - 1) * near(times, ends, 0.1, 0.4) + (AT_JUMP - 1) * near(times, jumps, 0.1, 0.15)
    rate = BLINKS / 60 * np.exp(rng.normal(0, BLINKS_DEVIATION) - BLINKS_DEVIATION**2 / 2)
    return arrivals(rng, rate * boost / boost.mean(), REFRACTORY_S)


def lids(rng: Generator, num_frames: int, starts: Sequence[float]) -> Floats:
    """Return how far blinks close the lids, (f,) 0 to 1: they close in 0.08 s and open in twice to three times that."""
    times, closed = frame_times(num_frames), np.zeros(num_frames)
    for start in starts:
        depth = 1.0 if rng.random() < 0.85 else rng.uniform(0.5, 0.9)
        shut = start + rng.uniform(0.07, 0.1)
        opens = shut + rng.uniform(0.03, 0.07)
        down, up = ease((times - start) / (shut - start)), ease((times - opens) / rng.uniform(0.16, 0.26))
        closed = np.maximum(closed, depth * (down - up))
    return closed


def gaze(rng: Generator, num_frames: int, attention: Floats) -> tuple[Floats, list[float]]:
    """Draw where the person looks, (f, 2) radians right and up of the viewer, and the times of its jumps in seconds.

    attention: (f,) probability that a fixation is at the viewer.
    """
    directions, moment, jumps = np.zeros((num_frames, 2)), 0.0, list[float]()
    while (frame := int(moment * FRAME_RATE_HZ)) < num_frames:
        where = "viewer" if rng.random() < attention[frame] else "away"
        directions[frame:] = rng.normal(0, AT_VIEWER if where == "viewer" else AWAY)
        # A fixation begins anywhere in the first one.
        moment += rng.uniform(*FIXATION_S[where]) * (rng.random() if moment == 0 else 1)
        if frame and np.abs(directions[frame] - directions[frame - 1]).max() > 0.06:
            jumps.append(frame / FRAME_RATE_HZ)
    return np.clip(smooth(directions, 0.45), -0.5, 0.5), jumps


def eyes_in_head(directions: Floats, pose: Floats) -> Floats:
    """Return the renderer's gaze (f, 2) of eyes that look in directions (f, 2) while the head has a pose (f, 3)."""
    right = (directions[:, 0] - pose[:, 1]) / LOOK_SIDEWAYS
    up = directions[:, 1] + pose[:, 0]
    looks: Floats = np.clip(np.stack([right, np.where(up > 0, up / LOOK_UP, up / LOOK_DOWN)], 1), -1.3, 1.3)
    return looks
