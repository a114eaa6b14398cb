"""Noise levels that training draws, and the losses of both stages.

Flow matching: x_s = (1 - s) x0 + s noise, velocity = noise - x0, sigma s in [0, 1].

Axes: b batch, k blocks, c channels, t latent frames, h w of latents.
"""

import torch
from torch import Generator, Tensor

from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.sampler import shifted
from training.batches import Share

# Lower sigmas teach little: x is clean already, and the velocity is all noise. A level of the schedule may be lower.
MIN_SIGMA = 0.02


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Return the point of the straight path from clean to noise at sigma in [0, 1]."""
    return (1 - sigma) * clean + sigma * noise


def draw_sigmas(batch_size: int, num_blocks: int, config: NetworkConfig, shift: float, generator: Generator) -> Tensor:
    """Draw the sigmas (b, k) of the blocks of clips.

    Half of the clips draw from the whole range, half from the schedule's levels. Independently, half have one level for
    all blocks, like the history of a stream, and half one level per block, as in diffusion forcing (arXiv 2407.01392).
    """
    schedule = torch.tensor(config.schedule[:-1])
    uniform = shifted(torch.rand(batch_size, num_blocks, generator=generator), shift).clamp(MIN_SIGMA, 1)
    scheduled = schedule[torch.randint(len(schedule), (batch_size, num_blocks), generator=generator)]
    is_scheduled, is_common = (torch.rand(2, batch_size, 1, generator=generator) < 0.5).unbind()
    sigmas = torch.where(is_scheduled, scheduled, uniform)
    return torch.where(is_common, sigmas[:, :1], sigmas)


def exit_levels(config: NetworkConfig) -> list[int]:
    """Return the levels whose clean estimates self-forcing can train.

    A clean estimate x - sigma v hardly depends on the network where sigma is next to nothing, such as the last level's
    of the public weights, .0089.
    """
    return [level for level, sigma in enumerate(config.schedule[:-1]) if sigma >= MIN_SIGMA]


def add_noise_per_frame(motion: Tensor, share: Share, generator: Generator) -> Tensor:
    """Noise motion frames (b, c, t, h, w), each to a uniformly drawn sigma of its own.

    Source: Live Avatar (arXiv 2512.04677): they stand in for the noisy history of stage 2.
    """
    b, _, t, _, _ = motion.shape
    sigma = share.of(torch.rand(b * share.world, 1, t, 1, 1, generator=generator)).to(motion)
    return add_noise(motion, share.noise(motion.shape, generator).to(motion), sigma)


def draw_sink_distances(config: NetworkConfig, num_blocks: int, generator: Generator) -> list[int]:
    """Draw the sink's distance from each block, in latent frames, from the range that serving uses."""
    if isinstance(config.sink_distance, int):
        return [config.sink_distance] * num_blocks
    low, high = config.sink_distance
    distances: list[int] = torch.randint(low, high + 1, (num_blocks,), generator=generator).tolist()
    return distances


def draw_level_distances(config: NetworkConfig, num_blocks: int, generator: Generator) -> list[list[int]]:
    """Draw the sink's distance at each level from each block: every level draws its own when served."""
    return [draw_sink_distances(config, num_blocks, generator) for _ in range(config.num_levels)]


def flow_matching_loss(
    predicted: Tensor, velocity: Tensor, sigma: Tensor, weight: Tensor, config: NetworkConfig
) -> Tensor:
    """Return the weighted mean squared error of each clip, (b,).

    predicted, velocity: (b, c, t, h, w). sigma: of each frame, (b, 1, t, 1, 1). weight: as in `ClipBatch`.
    For a network that predicts x0, the error is that of x0 at weight 1 / (sigma^2 + 0.3): in velocity, the cleanest
    levels would dominate the loss.
    """
    scale = sigma**2 / (sigma**2 + 0.3) if config.output == "x0_residual" else torch.ones_like(sigma)
    return ((predicted - velocity) ** 2 * scale * weight).mean((1, 2, 3, 4))


def dmd_gradient(generated: Tensor, fake: Tensor, real: Tensor) -> Tensor:
    """Return DMD's gradient for generated clips, (b, c, t, h, w): fake - real, normalised.

    generated: the generator's clean latents. fake, real: the clean estimates of critic and teacher for the same clips
    under noise. The normaliser mean |generated - real| makes the step size independent of the noise level.
    Source: distribution matching distillation (arXiv 2405.14867), normalised as in Self-Forcing (arXiv 2506.08009).
    """
    size = (generated - real).abs().mean((1, 2, 3, 4), keepdim=True)
    return torch.nan_to_num((fake - real) / size)


def dmd_loss(generated: Tensor, gradient: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Return a scalar whose gradient for `generated` is `weight * gradient` over the number of elements.

    weight: as in `ClipBatch`.
    """
    return 0.5 * ((generated.float() - (generated - gradient).detach().float()).square() * weight).mean()
