"""Levels that training visits, and what it minimises.

Flow matching: x_s = (1 - s) x0 + s noise, velocity = noise - x0, s in [0, 1].

Axes: b batch, k blocks, c channels, t latent frames, h w of latents.
"""

import torch
from torch import Generator, Tensor

from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.schedule import shifted
from training.batches import Share

# Levels below this teach nothing: x is clean already, and the velocity is all noise.
LOWEST_SIGMA = 0.02


def with_noise(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Where the straight path from clean to noise is at sigma in [0, 1]."""
    return (1 - sigma) * clean + sigma * noise


def draw_sigmas(batch: int, num_blocks: int, config: NetworkConfig, shift: float, generator: Generator) -> Tensor:
    """Levels (b, k) of the blocks of clips.

    Half of the clips have levels from the whole range, half from the schedule's own; and half have one level for all
    their blocks, as a stream's history has, half a level for each, as in diffusion forcing (arXiv 2407.01392).
    """
    schedule = torch.tensor(config.schedule[:-1])
    anywhere = shifted(torch.rand(batch, num_blocks, generator=generator), shift)
    scheduled = schedule[torch.randint(len(schedule), (batch, num_blocks), generator=generator)]
    is_scheduled, is_common = (torch.rand(2, batch, 1, generator=generator) < 0.5).unbind()
    sigmas = torch.where(is_scheduled, scheduled, anywhere)
    return torch.where(is_common, sigmas[:, :1], sigmas).clamp(LOWEST_SIGMA, 1)


def noised_each(motion: Tensor, share: Share, generator: Generator) -> Tensor:
    """Motion frames (b, c, t, h, w), each at a level of its own from the whole range.

    Source: Live Avatar (arXiv 2512.04677): they stand in for the noisy history that rollouts will have.
    """
    b, _, t, _, _ = motion.shape
    sigma = share.of(torch.rand(b * share.world, 1, t, 1, 1, generator=generator)).to(motion)
    return with_noise(motion, share.noise(motion.shape, generator).to(motion), sigma)


def draw_distance(config: NetworkConfig, generator: Generator) -> int:
    """Where the sink stands, drawn as serving draws it."""
    if isinstance(config.sink_distance, int):
        return config.sink_distance
    low, high = config.sink_distance
    return int(torch.randint(low, high + 1, (), generator=generator))


def flow_loss(predicted: Tensor, velocity: Tensor, sigma: Tensor, weight: Tensor, config: NetworkConfig) -> Tensor:
    """The mean weighted square of errors, (b,).

    predicted, velocity: (b, c, t, h, w). sigma: of each frame, (b, 1, t, 1, 1). weight: (b, 1, t, h, w).
    A network that tells clean latents is judged by them, at 1 / (sigma^2 + 0.3): by velocity the cleanest levels would
    drown all others.
    """
    scale = sigma**2 / (sigma**2 + 0.3) if config.output == "x0_residual" else torch.ones_like(sigma)
    return ((predicted - velocity) ** 2 * scale * weight).mean((1, 2, 3, 4))


def dmd_gradient(made: Tensor, fake: Tensor, real: Tensor) -> Tensor:
    """Which way generated clips should move, (b, c, t, h, w): from what the critic expects to what the teacher does.

    made: the generator's clean latents. fake, real: those that critic and teacher see in them under noise. The size is
    that of the teacher's correction, whatever the level.
    Source: distribution matching distillation (arXiv 2405.14867), normalised as in Self-Forcing (arXiv 2506.08009).
    """
    size = (made - real).abs().mean((1, 2, 3, 4), keepdim=True)
    return torch.nan_to_num((fake - real) / size)


def moved_loss(made: Tensor, gradient: Tensor) -> Tensor:
    """A loss whose gradient by `made` is that gradient, over the number of elements."""
    return 0.5 * (made.float() - (made - gradient).detach().float()).square().mean()
