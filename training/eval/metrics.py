"""What can be said in numbers of a talking face's curves and frames.

Axes: f frames, h w height and width of frames.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Curve = NDArray[np.floating]
Pixels = NDArray[np.uint8]

MOST_LAG = 8
# r below this is chance, and its lag means nothing.
LEAST_AGREEMENT = 0.2
# A curve of a smaller range is still: rounding, not motion.
STILL = 1e-6
# Cells of a colour map along a frame's shorter side.
CELLS = 16


@dataclass(frozen=True)
class Figure:
    """A number, and what is to be said of it; or None, and why there is none."""

    value: float | None
    note: str = ""


def correlation(one: Curve, two: Curve) -> float:
    """Pearson's r of two curves (f,); 0 if one of them is still, since it says nothing about the other."""
    if np.ptp(one) < STILL or np.ptp(two) < STILL:
        return 0.0
    return float(np.corrcoef(one.astype(np.float64), two.astype(np.float64))[0, 1])


def shifted_correlation(made: Curve, truth: Curve, lag: int) -> float:
    """r of truth and what was made `lag` frames later; positive lags are a mouth that is late."""
    count = len(made) - abs(lag)
    return correlation(made[max(0, lag) :][:count], truth[max(0, -lag) :][:count])


def best_lag(pairs: Sequence[tuple[Curve, Curve]], most: int = MOST_LAG) -> int | None:
    """The lag in frames at which what was made agrees best with the truth, on average; None if that is but chance."""
    means = {lag: np.mean([shifted_correlation(*pair, lag) for pair in pairs]) for lag in range(-most, most + 1)}
    lag = max(means, key=lambda each: (means[each], -abs(each)))
    return lag if means[lag] >= LEAST_AGREEMENT else None


def mean_figure(values: Sequence[float]) -> Figure:
    """The mean, with its standard error where there are several values."""
    error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return Figure(float(np.mean(values)), "" if error is None else f"± {error:.2g} of {len(values)}")


def ratio_figure(pairs: Sequence[tuple[float, float]]) -> Figure:
    """Sum of what was made by sum of the truth."""
    made, truth = (sum(values) for values in zip(*pairs, strict=True))
    return Figure(made / truth) if truth > 0 else Figure(None, "the truth is still")


def lag_figure(pairs: Sequence[tuple[Curve, Curve]]) -> Figure:
    """The best lag."""
    lag = best_lag(pairs)
    return Figure(lag, f"r is below {LEAST_AGREEMENT} at every lag" if lag is None else "")


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


def corners(height: int, width: int) -> NDArray[np.bool_]:
    """(h, w) the upper corners: background in a portrait, whatever the head does."""
    places = np.zeros((height, width), bool)
    places[: height // 4, : width // 8] = places[: height // 4, -(width // 8) :] = True
    return places


def stillness_db(frames: Pixels, places: NDArray[np.bool_]) -> float:
    """How small the change from frame to frame is at places (h, w), in decibels below full scale.

    At most 99, of what does not change at all.
    """
    change = np.diff(frames[:, places].astype(np.float32), axis=0)
    return min(99.0, -10 * math.log10(float((change**2).mean()) / 255**2 + 1e-10))


def colour_map(frames: Pixels) -> NDArray[np.float64]:
    """Frames averaged over time and over cells: (f, h, w, 3) -> (rows, columns, 3)."""
    mean = frames.mean(0, dtype=np.float64)
    side = max(1, min(mean.shape[:2]) // CELLS)
    rows, columns = mean.shape[0] // side, mean.shape[1] // side
    cells = mean[: rows * side, : columns * side].reshape(rows, side, columns, side, 3)
    return np.asarray(cells.mean((1, 3)))


def distance(frames: Pixels, reference: Pixels) -> float:
    """Root mean square between the colour maps of frames (f, h, w, 3) and a picture (h, w, 3), in grey levels."""
    return float(np.sqrt(((colour_map(frames) - colour_map(reference[None])) ** 2).mean()))


def above_chance(pairs: Sequence[tuple[Curve, Curve]], apart: int = 25) -> float | None:
    """How often r of the pairs, on average, exceeds chance; None without chance.

    Chance is the root mean square of r with the second curve moved round by at least `apart` frames.
    """
    moved = [
        correlation(one, np.roll(two, shift)) for one, two in pairs for shift in range(apart, len(two) - apart + 1)
    ]
    chance = math.sqrt(float(np.mean(np.square(moved)))) if moved else 0.0
    return float(np.mean([correlation(*pair) for pair in pairs])) / chance if chance > 0 else None
