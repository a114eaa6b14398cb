"""Samplers, and the random numbers of a block: its initial noise and its sink distance.

All randomness comes from the session's seed and the block's index, drawn on the CPU in float32, so any number of
processes on any device start from the same bytes, in any order.

Axes: c channels, t latent frames, h w height and width of latents.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from avatar.types import Session


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
