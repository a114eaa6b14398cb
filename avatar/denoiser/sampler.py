"""How a block moves from one noise level to the next, and what is drawn at random for it.

All randomness comes from the session's seed and the block's index, drawn on the CPU in float32: any number of
processes and any device start from the same bytes, in whatever order they ask.
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
    # As there, the distance is a scalar tensor on the CPU and the first factor: torch rounds the product accordingly.
    move = (following - now) * velocity
    return (x.to(torch.promote_types(x.dtype, torch.float32)) + move).to(velocity.dtype)


SAMPLERS: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {"euler": euler_step}


# (session, index, num_frames) -> (c, t, h, w) float32.
NoiseSource = Callable[[Session, int, int], Tensor]


def noise(session: Session, index: int, num_frames: int) -> Tensor:
    """(c, t, h, w) standard normal float32: what block `index` is before level 0; t = num_frames."""
    channels, _, height, width = session.motion.shape
    generator = torch.Generator().manual_seed(mixed_seed(session.seed, "noise", index))
    return torch.randn(channels, num_frames, height, width, generator=generator)


def noise_of_clips(clip_blocks: int) -> NoiseSource:
    """The reference's noise: a clip of clip_blocks blocks is drawn at once, clip r from a generator seeded seed + r.

    Equal to the reference's only where it draws on the CPU.
    """

    def cut(session: Session, index: int, num_frames: int) -> Tensor:
        channels, _, height, width = session.motion.shape
        clip, block = divmod(index, clip_blocks)
        generator = torch.Generator().manual_seed((session.seed + clip) % 2**63)
        drawn = torch.randn(channels, clip_blocks * num_frames, height, width, generator=generator)
        return drawn[:, block * num_frames : (block + 1) * num_frames]

    return cut


def sink_distance(session: Session, index: int, level: int, allowed: int | tuple[int, int]) -> int:
    """How many latent frames ahead of block `index` the sink stands at this level: fixed, or drawn from low..high."""
    if isinstance(allowed, int):
        return allowed
    low, high = allowed
    generator = torch.Generator().manual_seed(mixed_seed(session.seed, "sink_distance", index, level))
    return int(torch.randint(low, high + 1, (), generator=generator))


def mixed_seed(*parts: int | str) -> int:
    """63 bits that change entirely with any of the parts."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
