"""Noise levels: which sigmas a block passes on its way from noise to clean."""

import numpy as np
import torch
from torch import Tensor


def flow_match_schedule(num_levels: int, shift: float) -> tuple[float, ...]:
    """num_levels descending sigmas in (0, 1] and a final 0, each exactly a float32.

    The shift s -> shift s / (1 + (shift - 1) s) is applied to the smallest sigma twice, because the scheduler that
    the public weights were distilled with shifts its range once and every level in it again.
    Source: diffusers' FlowMatchEulerDiscreteScheduler with 1000 training steps and a static shift.
    """
    lowest = shifted(torch.tensor(1 / 1000), shift).item()
    thousands = np.linspace(1000.0, lowest * 1000.0, num_levels)
    return (*(shifted(torch.from_numpy(thousands / 1000.0), shift).float().tolist()), 0.0)


def shifted(sigmas: Tensor, shift: float) -> Tensor:
    """Sigmas in [0, 1] moved towards noise (shift > 1), ends unmoved."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def timesteps(schedule: tuple[float, ...]) -> Tensor:
    """(levels,) float32 in (0, 1000]: what the network is conditioned on at each level."""
    return torch.tensor(schedule[:-1], dtype=torch.float32) * 1000
