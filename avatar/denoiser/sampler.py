"""Noise schedules, samplers, and the random numbers of a block: its initial noise and its sink distance.

A schedule is the descending sigmas from noise to clean.

All randomness comes from the session's seed and the block's index, drawn on the CPU in float32, so any number of
processes on any device start from the same bytes, in any order.

Axes: c channels, t latent frames, h w height and width of latents.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from avatar.types import Session


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


def euler_step(x: Tensor, velocity: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """Move x from one noise level to the next along the straight path; nothing is noised again.

    x, velocity: same shape and dtype. 1 >= sigma > sigma_next >= 0; sigma_next = 0 gives the clean latent.
    In half precision the product is rounded before a float32 sum, and the sum is rounded again.
    Source: flow matching's Euler step, as in diffusers' FlowMatchEulerDiscreteScheduler.
    """
    now, following = torch.tensor([sigma, sigma_next], dtype=torch.float32).unbind()
    # As in diffusers, the step is a scalar CPU tensor and the first factor, which decides how torch rounds the product.
    move = (following - now) * velocity
    return (x.to(torch.promote_types(x.dtype, torch.float32)) + move).to(velocity.dtype)


SAMPLERS: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {"euler": euler_step}


# Correlated noise is computed from a block before the last multiple of SEGMENT_BLOCKS, so far before it that the noise
# of earlier blocks weighs less than FORGOTTEN: a stream that starts anywhere has the same bytes.
SEGMENT_BLOCKS, FORGOTTEN = 64, 1e-3

# (session, index, num_frames) -> (c, t, h, w) float32.
NoiseSource = Callable[[Session, int, int], Tensor]


def noise(session: Session, index: int, num_frames: int) -> Tensor:
    """Draw the initial noise of block `index`: (c, t, h, w) standard normal float32, t = num_frames."""
    channels, _, height, width = session.motion.shape
    generator = torch.Generator().manual_seed(mix_seed(session.seed, "noise", index))
    return torch.randn(channels, num_frames, height, width, generator=generator)


def clip_noise(clip_blocks: int) -> NoiseSource:
    """Return the reference's noise source: one draw per clip of clip_blocks blocks, clip r seeded with seed + r.

    It equals the reference's noise only if that draws on the CPU.
    """

    def draw(session: Session, index: int, num_frames: int) -> Tensor:
        channels, _, height, width = session.motion.shape
        clip, block = divmod(index, clip_blocks)
        generator = torch.Generator().manual_seed((session.seed + clip) % 2**63)
        noise = torch.randn(channels, clip_blocks * num_frames, height, width, generator=generator)
        return noise[:, block * num_frames : (block + 1) * num_frames]

    return draw


@dataclass(eq=False)
class NoiseHistory:
    """The end of a stream's correlated noise so far, so that it is not computed again.

    start: block that it was computed from. next_index: block that comes after it. last: (c, h, w) its last frame.
    """

    start: int = 0
    next_index: int = 0
    last: Tensor | None = None


def correlated_noise(
    draw: NoiseSource, session: Session, index: int, num_frames: int, correlation: float, history: NoiseHistory
) -> Tensor:
    """Return the initial noise of block `index`, whose latent frames are correlated: (c, t, h, w), t = num_frames.

    It depends on session and index alone. correlation: of neighbouring latent frames, in [0, 1); 0 is `draw` itself.
    history: of the stream, updated in place.
    """
    if not correlation:
        return draw(session, index, num_frames)
    forgotten = math.ceil(math.log(FORGOTTEN) / math.log(correlation) / num_frames)
    start = max(0, index // SEGMENT_BLOCKS * SEGMENT_BLOCKS - forgotten)
    if (history.start, history.next_index) != (start, index):
        history.start, history.next_index, history.last = start, start, None
    for each in range(history.next_index, index + 1):
        frames = autoregressive(draw(session, each, num_frames), correlation, history.last)
        history.last = frames[:, -1]
    history.next_index = index + 1
    return frames


def autoregressive(noise: Tensor, correlation: float, before: Tensor | None = None) -> Tensor:
    """Correlate the frames of standard normal noise (..., t, h, w), a process AR(1); each stays standard normal.

    before: (..., h, w) the correlated frame before the first; None: the first is the process's start.
    """
    if not correlation:
        return noise
    frames = []
    for fresh in noise.unbind(-3):
        before = fresh if before is None else correlation * before + math.sqrt(1 - correlation**2) * fresh
        frames.append(before)
    return torch.stack(frames, dim=-3)


def sink_distance(session: Session, index: int, level: int, allowed: int | tuple[int, int]) -> int:
    """Return the latent frames from block `index` to the sink ahead of it at this level.

    allowed: the fixed distance, or the bounds (low, high), inclusive, of a uniform draw.
    """
    if isinstance(allowed, int):
        return allowed
    low, high = allowed
    generator = torch.Generator().manual_seed(mix_seed(session.seed, "sink_distance", index, level))
    return int(torch.randint(low, high + 1, (), generator=generator))


def mix_seed(*parts: int | str) -> int:
    """Hash the parts to a seed of 63 bits."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
