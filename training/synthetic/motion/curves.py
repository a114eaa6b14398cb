"""Curves that motion is made of: smooth noise, and events that come and go.

Axes: f frames at 25 Hz, g points, e curves.
"""

import numpy as np
from numpy.random import Generator

from training.data import FRAME_RATE_HZ
from training.synthetic.head import Floats


def smooth(curves: Floats, deviation: float) -> Floats:
    """Blur in time with a Gaussian, edge values repeated: (g, e) -> (g, e). deviation: in points."""
    reach = max(1, round(4 * deviation))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    kernel /= kernel.sum()
    padded = np.pad(curves, ((reach, reach), (0, 0)), mode="edge")
    return np.stack([np.convolve(column, kernel, "valid") for column in padded.T], 1)


def smooth_noise(rng: Generator, num_frames: int, count: int, tau_s: float) -> Floats:
    """Draw slow, smooth noise of unit variance: (f, count). tau_s: its time scale."""
    deviation = tau_s * FRAME_RATE_HZ
    margin = round(4 * deviation) + 1
    noise = smooth(rng.normal(size=(num_frames + 2 * margin, count)), deviation)[margin:-margin]
    scaled: Floats = noise * np.sqrt(2 * np.sqrt(np.pi) * deviation)
    return scaled


def frame_times(num_frames: int) -> Floats:
    """Return the middle of each frame in seconds, (f,)."""
    return (np.arange(num_frames) + 0.5) / FRAME_RATE_HZ


def ease(progress: Floats) -> Floats:
    """Return the minimum-jerk path from 0 to 1 of a progress that is cut to [0, 1]. Source: Flash and Hogan, 1985."""
    x = np.clip(progress, 0, 1)
    path: Floats = x**3 * (10 - 15 * x + 6 * x**2)
    return path


def swell(times: Floats, start: float, rise_s: float, hold_s: float, fall_s: float) -> Floats:
    """Return an event (f,) that rises from 0 to 1, holds and falls again. start: in seconds."""
    return ease((times - start) / rise_s) - ease((times - start - rise_s - hold_s) / fall_s)


def arrivals(rng: Generator, rate_hz: Floats, refractory_s: float) -> list[float]:
    """Draw the times, in seconds, of events whose rate (f,) changes from frame to frame.

    refractory_s: least time between two events. It is made up for, so that the mean rate is kept where possible.
    """
    hazard_hz = rate_hz / np.maximum(1 - rate_hz * refractory_s, 0.2)
    passed = np.concatenate([[0.0], np.cumsum(hazard_hz / FRAME_RATE_HZ)])
    edges = np.arange(len(passed)) / FRAME_RATE_HZ
    times: list[float] = []
    # The first event may be due any time, because motion goes on from before the clip.
    level = rng.exponential()
    while level < passed[-1]:
        time = float(np.interp(level, passed, edges))
        times.append(time)
        after = float(np.interp(min(time + refractory_s, edges[-1]), edges, passed))
        level = max(after, level) + rng.exponential()
    return times
