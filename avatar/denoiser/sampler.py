"""Samplers, and the random numbers of a block: its initial noise and its sink distance.

All randomness comes from the session's seed and the block's index, drawn on the CPU in float32, so any number of
processes on any device start from the same bytes, in any order.

Axes: c channels, t latent frames, h w height and width of latents.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

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
