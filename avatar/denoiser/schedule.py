"""Noise schedules: the descending sigmas from noise to clean."""

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


def timesteps(schedule: tuple[float, ...]) -> Tensor:
    """Return the timestep of each level, 1000 sigma: (levels,) float32 in (0, 1000]."""
    return torch.tensor(schedule[:-1], dtype=torch.float32) * 1000
