"""Metrics of a talking face: agreement of mouth curves, and properties of frames.

Axes: f frames, h w height and width of frames.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Curve = NDArray[np.floating]
Pixels = NDArray[np.uint8]

MAX_LAG = 8
# A lower r is chance, and its lag is meaningless.
MIN_CORRELATION = 0.2
# A curve with a smaller range is still: rounding, not motion.
STILL = 1e-6
# Deviation of the jaw below which a person does not speak in a clip.
SILENT = 0.02
# Cells of a colour map along the shorter side of a frame.
CELLS = 16


@dataclass(frozen=True)
class Metric:
    """A value with a remark, or None with the reason."""

    value: float | None
    note: str = ""


def speaks(jaw: Curve) -> bool:
    """Return whether a person speaks in a clip: lips that have nothing to follow say nothing about lip sync."""
    return float(np.std(jaw)) >= SILENT


def correlation(one: Curve, two: Curve) -> float:
    """Return Pearson's r of two curves (f,); 0 if one of them is still."""
    if np.ptp(one) < STILL or np.ptp(two) < STILL:
        return 0.0
    return float(np.corrcoef(one.astype(np.float64), two.astype(np.float64))[0, 1])


def shifted_correlation(rendered: Curve, truth: Curve, lag: int) -> float:
    """Return r of the truth and the rendered curve `lag` frames later. A positive lag is a late mouth."""
    count = len(rendered) - abs(lag)
    return correlation(rendered[max(0, lag) :][:count], truth[max(0, -lag) :][:count])


def best_lag(pairs: Sequence[tuple[Curve, Curve]], max_lag: int = MAX_LAG) -> int | None:
    """Return the lag in frames with the highest mean r over pairs of (rendered, truth); None if that r is chance."""
    means = {lag: np.mean([shifted_correlation(*pair, lag) for pair in pairs]) for lag in range(-max_lag, max_lag + 1)}
    lag = max(means, key=lambda each: (means[each], -abs(each)))
    return lag if means[lag] >= MIN_CORRELATION else None


def mean_metric(values: Sequence[float]) -> Metric:
    """Return the mean, with its standard error if there are several values."""
    error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return Metric(float(np.mean(values)), "" if error is None else f"± {error:.2g} of {len(values)}")


def ratio_metric(pairs: Sequence[tuple[float, float]]) -> Metric:
    """Return the sum of the rendered values over the sum of the true ones."""
    rendered, truth = (sum(values) for values in zip(*pairs, strict=True))
    return Metric(rendered / truth) if truth > 0 else Metric(None, "the truth is still")


def lag_metric(pairs: Sequence[tuple[Curve, Curve]]) -> Metric:
    """Return the best lag as a metric."""
    lag = best_lag(pairs)
    return Metric(lag, f"r is below {MIN_CORRELATION} at every lag" if lag is None else "")


def edge_energy(frames: Pixels) -> float:
    """Return the mean absolute difference between horizontal neighbours, in grey levels."""
    return float(np.abs(np.diff(frames.astype(np.int16), axis=2)).mean())


def sharpness(frames: Pixels) -> float:
    """Return the mean absolute Laplacian of the brightness, in grey levels, which blur reduces first."""
    grey = frames.mean(-1)
    neighbours = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    return float(np.abs(neighbours - 4 * grey[:, 1:-1, 1:-1]).mean())


def flicker(frames: Pixels) -> float:
    """Return the mean absolute second difference in time, in grey levels: low for smooth motion, high for flicker."""
    return float(np.abs(np.diff(frames.astype(np.int16), 2, axis=0)).mean())


def corners(height: int, width: int) -> NDArray[np.bool_]:
    """Return a mask (h, w) of the upper corners, which are background in any portrait."""
    mask = np.zeros((height, width), bool)
    mask[: height // 4, : width // 8] = mask[: height // 4, -(width // 8) :] = True
    return mask


def stillness_db(frames: Pixels, mask: NDArray[np.bool_]) -> float:
    """Return how far below full scale the change from frame to frame is within a mask (h, w), in dB; at most 99."""
    change = np.diff(frames[:, mask].astype(np.float32), axis=0)
    return min(99.0, -10 * math.log10(float((change**2).mean()) / 255**2 + 1e-10))


def colour_map(frames: Pixels) -> NDArray[np.float64]:
    """Average frames over time and cells: (f, h, w, 3) -> (rows, columns, 3)."""
    mean = frames.mean(0, dtype=np.float64)
    side = max(1, min(mean.shape[:2]) // CELLS)
    rows, columns = mean.shape[0] // side, mean.shape[1] // side
    cells = mean[: rows * side, : columns * side].reshape(rows, side, columns, side, 3)
    return np.asarray(cells.mean((1, 3)))


def distance(frames: Pixels, reference: Pixels) -> float:
    """Return the root mean square difference between the sorted colours of frames (f, h, w, 3) and a picture (h, w, 3).

    In grey levels, of the cells of their colour maps. Sorted, since places follow the head: by place, true frames of
    people who turn differ from their portrait by 12 grey levels, and a tint of 6 % adds 1; sorted, 2 and 3.5.
    """
    colours = (np.sort(colour_map(each).reshape(-1, 3), axis=0) for each in (frames, reference[None]))
    return float(np.sqrt((np.subtract(*colours) ** 2).mean()))


def ratio_to_chance(pairs: Sequence[tuple[Curve, Curve]], min_shift: int = 25) -> float | None:
    """Return the mean r of the pairs over the r of chance; None if that is 0.

    Chance is the root mean square of r with the second curve rotated by at least `min_shift` frames.
    """
    shifted = [
        correlation(one, np.roll(two, shift))
        for one, two in pairs
        for shift in range(min_shift, len(two) - min_shift + 1)
    ]
    chance = math.sqrt(float(np.mean(np.square(shifted)))) if shifted else 0.0
    return float(np.mean([correlation(*pair) for pair in pairs])) / chance if chance > 0 else None
