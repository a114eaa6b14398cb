"""Noise schedules: the descending sigmas from noise to clean."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def flow_match_schedule(num_levels: int, shift: float) -> tuple[float, ...]:
    """Return num_levels descending sigmas in (0, 1] and a final 0, each exactly a float32.

    The shift s -> shift s / (1 + (shift - 1) s) is applied to the smallest sigma twice, because the scheduler used to
    distil the public weights shifts its range once and every level in it again.
    Source: diffusers' FlowMatchEulerDiscreteScheduler with 1000 training steps and a static shift.
    """
    lowest = shifted(torch.tensor(1 / 1000), shift).item()
    thousands = np.linspace(1000.0, lowest * 1000.0, num_levels)
    return (*(shifted(torch.from_numpy(thousands / 1000.0), shift).float().tolist()), 0.0)


def shifted(sigmas: Tensor, shift: float) -> Tensor:
    """Shift sigmas in [0, 1] towards noise (shift > 1); 0 and 1 stay. Source: SD3 (arXiv 2403.03206)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


# Sigmas are printed with this many decimals at least.
TOLERANCE = 5e-4


def select_levels(schedule: tuple[float, ...], choice: int | Sequence[float]) -> tuple[float, ...]:
    """Return the schedule with some of its levels left out; the first level stays, since blocks start from noise.

    choice: the number of levels, or the sigmas to keep, rounded to three decimals or more. Of a number, the level is
    left out first whose absence changes the Euler path least: for a velocity that changes evenly with sigma, that is
    the one with the smallest product of the steps before and after it. ValueError if the schedule has no such levels.
    """
    *sigmas, end = schedule
    trained = ", ".join(f"{sigma:g}" for sigma in sigmas)
    if isinstance(choice, int):
        if not 1 <= choice <= len(sigmas):
            raise ValueError(f"the number of levels must be 1 to {len(sigmas)}, got {choice}")
        while len(sigmas) > choice:
            path = [*sigmas, end]
            products = [(path[i - 1] - path[i]) * (path[i] - path[i + 1]) for i in range(1, len(sigmas))]
            del sigmas[1 + products.index(min(products))]
        return (*sigmas, end)
    kept = [next((sigma for sigma in sigmas if abs(sigma - chosen) < TOLERANCE), None) for chosen in choice]
    if None in kept or not kept:
        raise ValueError(f"the checkpoint was trained for levels of sigma {trained}; expected some of them")
    if kept != [sigma for sigma in sigmas if sigma in kept] or kept[0] != sigmas[0]:
        raise ValueError(f"the levels must descend from the first of sigma {trained}")
    return (*[sigma for sigma in kept if sigma is not None], end)


def timesteps(schedule: tuple[float, ...]) -> Tensor:
    """Return the timestep of each level, 1000 sigma: (levels,) float32 in (0, 1000]."""
    return torch.tensor(schedule[:-1], dtype=torch.float32) * 1000
