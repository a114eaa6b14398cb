"""Previews of a network in training: frames of held-out clips and of the network's own under the same conditions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Generator, Tensor

from avatar.checkpoints.part import Part
from avatar.denoiser.config import NetworkConfig
from avatar.types import FRAMES_PER_LATENT
from avatar.vae import vae
from avatar.vae.vae import Vae
from training.batches import BatchConfig, load_batch
from training.data import StoredClip
from training.losses import draw_sink_distance
from training.self_forcing import BlockwiseGeneration
from training.strategy import Strategy, WrappedNetwork

VALIDATION_SEED = 1 << 20
# People in a preview, blocks of each, and frames from one picture to the next.
BATCHES = BatchConfig(batch_size=3, num_blocks=(3, 3), audio_dropout=0.0, same_position=True)
STRIDE = 4


def load_codec(folder: Path | None, device: torch.device) -> Vae[Any] | None:
    """Load the codec of a vae folder, if one is given."""
    return vae.load(Part.read(folder), device) if folder else None


@torch.no_grad()
def preview_rows(
    wrapped: WrappedNetwork,
    config: NetworkConfig,
    held_out: Sequence[StoredClip],
    codec: Vae[Any] | None,
    strategy: Strategy,
) -> list[Tensor]:
    """Return rows of frames (n, 3, h, w): each clip, and below it the clip that the network generates.

    The rows are the same on every process. Empty without a codec.
    """
    if codec is None:
        return []
    batch = load_batch(held_out, BATCHES, config, VALIDATION_SEED, 0).to(strategy.device)
    random = Generator().manual_seed(0)
    last = config.num_levels - 1
    with strategy.autocast():
        distance = draw_sink_distance(config, random)
        generation = wrapped(BlockwiseGeneration, wrapped.network, config, batch, distance)
        generated = torch.cat(wrapped(generation.outputs, wrapped(generation.inputs, last, random), last), dim=2)
    pairs = zip(
        decode_frames(batch.latents, batch.reference, codec),
        decode_frames(generated, batch.reference, codec),
        strict=True,
    )
    return [row[::STRIDE] for pair in pairs for row in pair]


def decode_frames(latents: Tensor, reference: Tensor, codec: Vae[Any]) -> Tensor:
    """Decode latents (b, c, t, h, w) behind the reference (b, c, 1, h, w) to frames (b, f, 3, h, w)."""
    frames = codec.codec.decode(torch.cat([reference, latents.to(reference)], dim=2), codec.codec.new_state())
    return rearrange(frames[:, :, -latents.shape[2] * FRAMES_PER_LATENT :].float().cpu(), "b c f h w -> b f c h w")
