"""Previews of a network in training: frames of held-out clips and of the network's own under the same conditions.

Axes: b batch, c latent channels, t latent frames, f pixel frames, h w height and width of latents or frames.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Generator, Tensor

from avatar.checkpoints.part import Part
from avatar.denoiser.config import NetworkConfig
from avatar.types import FRAMES_PER_LATENT
from avatar.vae import vae
from avatar.vae.vae import Vae
from training.batches import BatchConfig, draw_spans, load_batch
from training.data import StoredClip
from training.eval.metrics import correlation, sharpness
from training.losses import draw_level_distances
from training.self_forcing import BlockwiseGeneration
from training.strategy import Strategy, WrappedNetwork

VALIDATION_SEED = 1 << 20
# People in a preview, blocks of each, and frames from one picture to the next.
BATCHES = BatchConfig(
    batch_size=3,
    num_blocks=(3, 3),
    audio_dropout=0.0,
    heard_dropout=0.0,
    face_motion_dropout=0.0,
    same_position=True,
)
STRIDE = 4
# People whose mouths are measured, and pixel frames of each. Half the height and width of the box around the lips, by
# the picture's height.
NUM_MOUTHS, MOUTH_FRAMES, MOUTH_BOX = 6, 48, (0.11, 0.14)


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
    truth, generated, _ = decoded_clips(wrapped, config, held_out, BATCHES, codec, strategy)
    return [row[::STRIDE] for pair in zip(truth, generated, strict=True) for row in pair]


@torch.no_grad()
def mouth_metrics(
    wrapped: WrappedNetwork,
    config: NetworkConfig,
    held_out: Sequence[StoredClip],
    codec: Vae[Any] | None,
    strategy: Strategy,
) -> dict[str, float]:
    """Return lips_r, mouth_amplitude and sharpness of generated mouths against the true ones, without landmarks.

    Mouths are compared by the darkness around the true lips, which an open mouth raises, less that in the still
    portrait, on which the moving place alone changes it: r of the curves, the ratio of their deviations, and of
    sharpness in the whole picture. The same on every process. Empty without a codec or known lips.
    """
    labelled = [clip for clip in held_out if clip.has("lips")]
    if codec is None or not labelled:
        return {}
    batches = replace(BATCHES, batch_size=NUM_MOUTHS, num_blocks=(MOUTH_FRAMES // config.frames_per_block,) * 2)
    truth, generated, portraits = decoded_clips(wrapped, config, labelled, batches, codec, strategy)
    num_blocks, spans = draw_spans(labelled, batches, config, VALIDATION_SEED, 0)
    curves, sharp = [], []
    for span, portrait, *pair in zip(spans, portraits, truth, generated, strict=True):
        first = span.start * config.frames_per_block
        lips = np.array(span.clip.array("lips")[first : first + num_blocks * config.frames_per_block])
        still = darkness(portrait[None].expand_as(pair[0]), lips)
        curves.append([darkness(frames, lips) - still for frames in pair])
        sharp.append([sharpness(to_bytes(frames)) for frames in pair])
    deviations = np.array([[curve.std() for curve in pair] for pair in curves]).sum(0)
    true_sharpness, own_sharpness = np.array(sharp).sum(0)
    return {
        "lips_r": float(np.mean([correlation(*pair) for pair in curves])),
        "mouth_amplitude": float(deviations[1] / max(deviations[0], 1e-9)),
        "sharpness": float(own_sharpness / max(true_sharpness, 1e-9)),
    }


def darkness(frames: Tensor, lips: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return how much darker than its mean the surroundings of the lips are: (f, 3, h, w) in [-1, 1] -> (f,).

    lips: (f, 2) row and column of their centre in pixels.
    """
    grey, height = frames.mean(1).numpy(), frames.shape[2]
    boxes = [[round(side * height) for side in MOUTH_BOX]] * len(lips)
    curve = []
    for picture, place, (high, wide) in zip(grey, lips.round().astype(int), boxes, strict=True):
        row, column = np.clip(place, 0, height - 1)
        box = picture[max(0, row - high) : row + high + 1, max(0, column - wide) : column + wide + 1]
        curve.append(np.clip(box.mean() - box, 0, None).mean())
    return np.array(curve)


def to_bytes(frames: Tensor) -> NDArray[np.uint8]:
    """Convert frames (f, 3, h, w) in [-1, 1] to (f, h, w, 3) uint8."""
    scaled = ((frames + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return rearrange(scaled, "f c h w -> f h w c").numpy()


@torch.no_grad()
def decoded_clips(
    wrapped: WrappedNetwork,
    config: NetworkConfig,
    held_out: Sequence[StoredClip],
    batches: BatchConfig,
    codec: Vae[Any],
    strategy: Strategy,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the frames (b, f, 3, h, w) of a batch of clips, those that the network generates for them, and portraits.

    Portraits are (b, 3, h, w).
    """
    batch = load_batch(held_out, batches, config, VALIDATION_SEED, 0).to(strategy.device)
    random, last = Generator().manual_seed(0), config.num_levels - 1
    with strategy.autocast():
        distances = draw_level_distances(config, batches.num_blocks[0], random)
        generation = wrapped(BlockwiseGeneration, wrapped.network, config, batch, distances)
        generated = torch.cat(wrapped(generation.outputs, wrapped(generation.inputs, last, random), last), dim=2)
    return (
        decode_frames(batch.latents, batch.reference, codec),
        decode_frames(generated, batch.reference, codec),
        decode_frames(batch.reference, batch.reference, codec)[:, -1],
    )


def decode_frames(latents: Tensor, reference: Tensor, codec: Vae[Any]) -> Tensor:
    """Decode latents (b, c, t, h, w) behind the reference (b, c, 1, h, w) to frames (b, f, 3, h, w)."""
    frames = codec.codec.decode(torch.cat([reference, latents.to(reference)], dim=2), codec.codec.new_state())
    return rearrange(frames[:, :, -latents.shape[2] * FRAMES_PER_LATENT :].float().cpu(), "b c f h w -> b f c h w")
