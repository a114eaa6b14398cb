"""What a network makes of held-out clips, as pictures to look at while it trains."""

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
from training.batches import BatchRule, batch_of
from training.data import StoredClip
from training.losses import draw_distance
from training.self_forcing import Rollout
from training.strategy import Spread, Strategy

WATCHED_SEED = 1 << 20
# People on a sheet, blocks of each, and frames from one picture to the next.
RULE = BatchRule(batch=3, num_blocks=(3, 3), silence=0.0, together=True)
STRIDE = 4


def read_codec(folder: Path | None, device: torch.device) -> Vae[Any] | None:
    return vae.load(Part.read(folder), device) if folder else None


@torch.no_grad()
def rollout_rows(
    spread: Spread, config: NetworkConfig, held_out: Sequence[StoredClip], codec: Vae[Any] | None, strategy: Strategy
) -> list[Tensor]:
    """Rows of frames, each (pictures, 3, h, w), for a sheet: a clip, and below it a rollout under its conditions.

    The same on every process. None without a codec.
    """
    if codec is None:
        return []
    batch = batch_of(held_out, RULE, config, WATCHED_SEED, 0).to(strategy.device)
    draws = Generator().manual_seed(0)
    last = config.num_levels - 1
    with strategy.autocast():
        rollout = spread(Rollout, spread.network, config, batch, draw_distance(config, draws))
        made = torch.cat(spread(rollout.outputs, spread(rollout.inputs, last, draws), last), dim=2)
    pairs = zip(frames_of(batch.latents, batch.reference, codec), frames_of(made, batch.reference, codec), strict=True)
    return [row[::STRIDE] for pair in pairs for row in pair]


def frames_of(latents: Tensor, reference: Tensor, codec: Vae[Any]) -> Tensor:
    """(b, f, 3, h, w): what latents look like after the reference."""
    frames = codec.codec.decode(torch.cat([reference, latents.to(reference)], dim=2), codec.codec.new_state())
    return rearrange(frames[:, :, -latents.shape[2] * FRAMES_PER_LATENT :].float().cpu(), "b c f h w -> b f c h w")
