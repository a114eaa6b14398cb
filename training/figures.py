"""What can be said in numbers of a talking face's curves and frames.

Axes: f frames, h w height and width of frames.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Curve = NDArray[np.floating]
Pixels = NDArray[np.uint8]

MOST_LAG = 8
# A curve that deviates less from its mean is still: rounding, not motion.
STILL = 1e-6
# Side of the cells of a colour map, as a share of the frame's.
CELL_SHARE = 16


def correlation(one: Curve, two: Curve) -> float:
    """Pearson's r of two curves (f,); 0 if one of them is still, since it says nothing about the other."""
    if one.std() < STILL or two.std() < STILL:
        return 0.0
    return float(np.corrcoef(one, two)[0, 1])


def shifted_correlation(made: Curve, truth: Curve, lag: int) -> float:
    """r of truth and what was made `lag` frames later; positive lags are a mouth that is late."""
    count = len(made) - abs(lag)
    return correlation(made[max(0, lag) :][:count], truth[max(0, -lag) :][:count])


def best_lag(pairs: Sequence[tuple[Curve, Curve]], most: int = MOST_LAG) -> int | None:
    """The lag in frames at which what was made agrees best with the truth, on average; None if it never does."""
    means = {lag: np.mean([shifted_correlation(*pair, lag) for pair in pairs]) for lag in range(-most, most + 1)}
    lag = max(means, key=lambda each: (means[each], -abs(each)))
    return lag if means[lag] > 0 else None


def ratio(made: Sequence[float], truth: Sequence[float]) -> float | None:
    """Sum of one by sum of the other; None if there is no truth to compare with."""
    return sum(made) / sum(truth) if sum(truth) > 0 else None


def edge_energy(frames: Pixels) -> float:
    """Mean absolute difference between horizontal neighbours, in grey levels."""
    return float(np.abs(np.diff(frames.astype(np.int16), axis=2)).mean())


def sharpness(frames: Pixels) -> float:
    """Mean absolute Laplacian of the brightness, in grey levels: what blur takes first."""
    grey = frames.mean(-1)
    around = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    return float(np.abs(around - 4 * grey[:, 1:-1, 1:-1]).mean())


def flicker(frames: Pixels) -> float:
    """Mean absolute second difference in time, in grey levels: smooth motion has little of it, flicker much."""
    return float(np.abs(np.diff(frames.astype(np.int16), 2, axis=0)).mean())


def still_places(frames: Pixels, tolerance: int = 2) -> NDArray[np.bool_]:
    """(h, w) where the frames never differ from the first by more than a few grey levels."""
    return np.asarray(np.abs(frames.astype(np.int16) - frames[0]).max((0, 3)) <= tolerance)


def stillness_db(frames: Pixels, places: NDArray[np.bool_]) -> float | None:
    """How small the change from frame to frame is at places (h, w), in decibels below full scale.

    At most 99, of what does not change at all; None if there are no such places.
    """
    if not places.any() or len(frames) < 2:
        return None
    change = np.diff(frames[:, places].astype(np.float32), axis=0)
    return min(99.0, -10 * math.log10(float((change**2).mean()) / 255**2 + 1e-10))


def colour_map(frames: Pixels) -> NDArray[np.float64]:
    """Frames averaged over time and over cells: (f, h, w, 3) -> (rows, columns, 3)."""
    mean = frames.mean(0, dtype=np.float64)
    side = max(1, min(mean.shape[:2]) // CELL_SHARE)
    rows, columns = mean.shape[0] // side, mean.shape[1] // side
    cells = mean[: rows * side, : columns * side].reshape(rows, side, columns, side, 3)
    return np.asarray(cells.mean((1, 3)))


def distance(frames: Pixels, reference: Pixels) -> float:
    """Root mean square between the colour maps of frames (f, h, w, 3) and a picture (h, w, 3), in grey levels."""
    return float(np.sqrt(((colour_map(frames) - colour_map(reference[None])) ** 2).mean()))


def against_chance(opening: Curve, loudness: Curve, apart: int = 25) -> tuple[int | None, float, float | None]:
    """How an opening mouth goes with loudness: lag in frames, r at that lag, and how often r exceeds chance.

    Chance is the root mean square of r with the sound moved round by at least `apart` frames. Nones if there is none.
    """
    lag = best_lag([(opening, loudness)])
    moved = [correlation(opening, np.roll(loudness, shift)) for shift in range(apart, len(loudness) - apart)]
    chance = math.sqrt(float(np.mean(np.square(moved)))) if moved else 0.0
    peak = shifted_correlation(opening, loudness, lag or 0)
    return lag, peak, peak / chance if chance > 0 else None
