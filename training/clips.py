"""The network over whole clips at once: stage 1's training pass, and both score networks of stage 2.

Causal: each block has a noise level of its own and attends to the noisy blocks in its window. Bidirectional: each block
attends to the whole clip.

Axes: b batch, k blocks, c channels, t latent frames, h w of latents.
"""

import torch
from einops import repeat
from torch import Tensor

from avatar.denoiser.attention import REFERENCE_FRAME
from avatar.denoiser.cache import ClipHistory
from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.denoiser import to_velocity
from avatar.denoiser.model import Network
from training.batches import ClipBatch


def frame_sigmas(sigmas: Tensor, config: NetworkConfig) -> Tensor:
    """Repeat the sigmas of blocks (b, k) for their latent frames, (b, 1, t, 1, 1)."""
    return repeat(sigmas, "b k -> b 1 (k t) 1 1", t=config.num_frames_per_block)


def clean_estimate(x: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """Return x0 = x - sigma v, the clean latents that a velocity at x points to."""
    return x - sigma * velocity


def reference_frames(first_block: Tensor, num_blocks: int, config: NetworkConfig, distance: int) -> list[int | Tensor]:
    """Return the reference's temporal position for each block of clips that start at first_block (b,): (b,) each."""
    firsts = ((first_block + block) * config.num_frames_per_block for block in range(num_blocks))
    return [(first + distance).clamp(min=REFERENCE_FRAME) for first in firsts]


def predict_velocity(
    network: Network,
    config: NetworkConfig,
    x: Tensor,
    sigmas: Tensor,
    batch: ClipBatch,
    distance: int,
    is_causal: bool = True,
) -> Tensor:
    """Predict the velocity at noisy clips x (b, c, t, h, w) whose blocks have sigmas (b, k) in (0, 1].

    batch: the clips' conditions; its latents are not used. distance: of the sink, in latent frames.
    is_causal: False runs the published bidirectional network: each block attends to the whole clip, the clip starts at
    frame 0, and the reference keeps the position that prefill gives it.
    """
    height, width = x.shape[-2:]
    text = network.embed_text(batch.text)
    conditions = network.prefill(batch.reference, batch.motion, text)
    first_block = batch.first_block if is_causal else torch.zeros_like(batch.first_block)
    positions = reference_frames(first_block, sigmas.shape[1], config, distance) if is_causal else [REFERENCE_FRAME]
    history = ClipHistory(config, height, width, conditions, positions, is_causal)
    pose = repeat(batch.reference, "b c 1 h w -> b c t h w", t=x.shape[2])
    if config.pose == "zeros":
        pose = torch.zeros_like(pose)
    sigma = frame_sigmas(sigmas, config)
    modulation = network.embed_time(1000 * sigma[:, 0, :, 0, 0])
    audio = network.encode_audio(batch.features)
    output = network(x, modulation, text, audio, pose, first_block * config.num_frames_per_block, history)
    return to_velocity(output.float(), x, batch.reference, sigma, config)
