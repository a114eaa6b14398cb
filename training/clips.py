"""The network over whole clips at once: what stage 1 trains, and what both scores of stage 2 are.

Every block of a clip has a noise level of its own and sees the blocks of its window as noisy as they are; or, for
scores that are not causal, the whole clip.

Axes: b batch, k blocks, c channels, t latent frames, h w of latents.
"""

import torch
from einops import repeat
from torch import Tensor

from avatar.denoiser.attention import REFERENCE_FRAME
from avatar.denoiser.cache import ClipHistory
from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.denoiser import velocity_of
from avatar.denoiser.model import Network
from training.batches import ClipBatch


def per_frame(sigmas: Tensor, config: NetworkConfig) -> Tensor:
    """Levels of blocks (b, k) as levels of latent frames (b, 1, t, 1, 1)."""
    return repeat(sigmas, "b k -> b 1 (k t) 1 1", t=config.num_frames_per_block)


def clean_of(x: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The clean latents that a velocity at x means."""
    return x - sigma * velocity


def reference_frames(first_block: Tensor, num_blocks: int, config: NetworkConfig, distance: int) -> list[int | Tensor]:
    """Where each block of clips that begin at first_block (b,) sees the reference, (b,) each."""
    firsts = ((first_block + block) * config.num_frames_per_block for block in range(num_blocks))
    return [(first + distance).clamp(min=REFERENCE_FRAME) for first in firsts]


def predict(
    network: Network,
    config: NetworkConfig,
    x: Tensor,
    sigmas: Tensor,
    batch: ClipBatch,
    distance: int,
    is_causal: bool = True,
) -> Tensor:
    """The velocity at noisy clips x (b, c, t, h, w) whose blocks have the levels sigmas (b, k) in (0, 1].

    batch: what the clips are made under; its latents are not looked at. distance: of the sink.
    Not causal is the public network before it was made so: every block sees the whole clip, which begins at frame 0,
    and the reference stands where prefill puts it.
    """
    height, width = x.shape[-2:]
    text = network.embed_text(batch.text)
    conditions = network.prefill(batch.reference, batch.motion, text)
    first_block = batch.first_block if is_causal else torch.zeros_like(batch.first_block)
    places = reference_frames(first_block, sigmas.shape[1], config, distance) if is_causal else [REFERENCE_FRAME]
    history = ClipHistory(config, height, width, conditions, places, is_causal)
    pose = repeat(batch.reference, "b c 1 h w -> b c t h w", t=x.shape[2])
    if config.pose == "zeros":
        pose = torch.zeros_like(pose)
    sigma = per_frame(sigmas, config)
    modulation = network.embed_time(1000 * sigma[:, 0, :, 0, 0])
    audio = network.encode_audio(batch.features)
    output = network(x, modulation, text, audio, pose, first_block * config.num_frames_per_block, history)
    return velocity_of(output.float(), x, batch.reference, sigma, config)
