"""Pose of the head: sway, changes of position, beats of the own speech, and nods to the other's.

Angles are pitch (positive looks down), yaw (positive to the right of the picture) and roll, in radians.

Axes: f frames at 25 Hz.
"""

from collections.abc import Sequence

import numpy as np
from numpy.random import Generator

from training.synthetic.head import Floats
from training.synthetic.motion.curves import arrivals, ease, frame_times, smooth_noise, swell

# Standard deviations of sway in pitch, yaw and roll, and its components: time scale in seconds and share. Together they
# have the spectrum of recorded heads, which falls with the square of the frequency.
SWAY = np.array((0.03, 0.045, 0.018))
COMPONENTS = ((0.07, 0.08), (0.16, 0.2), (0.45, 0.5), (1.5, 0.84))
# Rate of changes of position, their deviations, and how long one takes.
SHIFT_HZ, SHIFT, SHIFT_S = 0.3, np.array((0.05, 0.11, 0.035)), (0.35, 0.9)
# Less of both while listening.
LISTENING = 0.6
LIMIT = np.array((0.3, 0.42, 0.22))
# A nod follows the end of the other's phrase by this time, in seconds.
LATENCY_S, LATENCY_DEVIATION_S, LATENCY_RANGE_S = 0.5, 0.12, (0.3, 1.0)
NOD_PROBABILITY, NOD_HZ, NOD_PEAK = 0.8, (1.6, 2.6), (0.05, 0.14)


def sway(rng: Generator, num_frames: int) -> Floats:
    """Draw the pose's random motion, (f, 3)."""
    whole = np.zeros((num_frames, 3))
    for tau_s, share in COMPONENTS:
        whole += share * smooth_noise(rng, num_frames, 3, tau_s)
    swayed: Floats = whole * SWAY
    return swayed


def shifts(rng: Generator, num_frames: int) -> tuple[Floats, list[float]]:
    """Draw changes of position, which are eased and last until the next: (f, 3), and their times in seconds."""
    times = frame_times(num_frames)
    pose = np.tile(rng.normal(0, SHIFT * 0.6), (num_frames, 1))
    moments = arrivals(rng, np.full(num_frames, SHIFT_HZ), 1.0)
    for moment in moments:
        # Half of the way back to the camera, so that positions do not pile up.
        target = 0.3 * pose[-1] + rng.normal(0, SHIFT)
        progress = ease((times - moment) / rng.uniform(*SHIFT_S))[:, None]
        pose = pose + progress * (target - pose[-1])
    return pose, moments


def beats(rng: Generator, loud: Floats) -> Floats:
    """Return the pitch (f,) of a head that dips with the own syllables. loud: loudness (f,), 0 to 1."""
    peaks = 1 + np.flatnonzero((loud[1:-1] > 0.35) & (loud[1:-1] > loud[:-2]) & (loud[1:-1] >= loud[2:]))
    times, pitch, strength = frame_times(len(loud)), np.zeros(len(loud)), rng.uniform(0.3, 1.0)
    for peak in peaks:
        if rng.random() < 0.45:
            late = (times - times[peak] - rng.uniform(-0.04, 0.06)) / 0.11
            # A small rise before the dip.
            pitch += rng.uniform(0.012, 0.035) * strength * (np.exp(-(late**2)) - 0.5 * np.exp(-((late + 1.8) ** 2)))
    return pitch


def reactions(rng: Generator, ends: Sequence[float], probability: float) -> list[float]:
    """Draw when a listener reacts to the ends of phrases, in seconds."""
    return [
        end + float(np.clip(rng.normal(LATENCY_S, LATENCY_DEVIATION_S), *LATENCY_RANGE_S))
        for end in ends
        if rng.random() < probability
    ]


def nods(rng: Generator, num_frames: int, starts: Sequence[float]) -> Floats:
    """Return the pitch (f,) of nods that start at times in seconds: one to three dips, each smaller than the last."""
    times, pitch = frame_times(num_frames), np.zeros(num_frames)
    peak, rate_hz = rng.uniform(*NOD_PEAK), rng.uniform(*NOD_HZ)
    for start in starts:
        height = peak * rng.uniform(0.75, 1.25)
        for _ in range(int(rng.choice((1, 2, 3), p=(0.45, 0.4, 0.15)))):
            half = 0.5 / rate_hz
            pitch = np.maximum(pitch, height * swell(times, start, half, 0.0, half))
            start += 2 * half
            height *= rng.uniform(0.45, 0.75)
    return pitch


def limited(pose: Floats) -> Floats:
    """Keep a pose (f, 3) within LIMIT, smoothly."""
    bounded: Floats = LIMIT * np.tanh(pose / LIMIT)
    return bounded
