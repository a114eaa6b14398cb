"""Batches of crops for the codec, decided by clips, seed and step: a resumed run sees what it would have seen.

Half of the crops hold the lips, if their place is known. Every crop is mirrored, and its colours changed, by chance.

Axes: b batch, c channels, f frames, h w height and width of crops.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from training.data import StoredClip

# How far around the lips' middle errors count more, in pixels (rows, columns).
LIPS_REACH = (11.0, 16.0)


@dataclass(frozen=True)
class CropRule:
    """What a batch is.

    size: of a crop, pixels, a multiple of 8. num_frames: 1 + 4 k. lips: how much more errors count at the lips' middle.
    """

    batch: int = 4
    size: int = 64
    num_frames: int = 13
    lips: float = 4.0


def to_pixels(frames: NDArray[np.uint8]) -> Tensor:
    """(..., f, h, w, 3) bytes to (..., 3, f, h, w) float32 in [-1, 1]."""
    return rearrange(torch.from_numpy(np.array(frames)), "... f h w c -> ... c f h w") / 127.5 - 1


def lips_weight(lips: NDArray[np.float32], height: int, width: int, more: float) -> Tensor:
    """How much each pixel's error counts, of mean 1 a frame: (f, 2) rows and columns to (1, f, h, w).

    more: how much more it counts at the lips' middle.
    """
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    row, column = rearrange(torch.from_numpy(np.array(lips)), "f (a h w) -> a f h w", h=1, w=1)
    near = torch.exp(-(((rows - row) / LIPS_REACH[0]) ** 2) - ((columns - column) / LIPS_REACH[1]) ** 2)
    weight = 1 + more * near
    return (weight / weight.mean((1, 2), keepdim=True))[None]


def recoloured(pixels: Tensor, rng: Generator) -> Tensor:
    """Other light, and now and then other colours: (3, f, h, w) in [-1, 1], alike."""
    gain = torch.from_numpy(rng.uniform(0.85, 1.15, 3).astype(np.float32))
    lift = torch.from_numpy((rng.uniform(-0.08, 0.08) + rng.uniform(-0.04, 0.04, 3)).astype(np.float32))
    order = rng.permutation(3) if rng.random() < 0.15 else np.arange(3)
    shaped = rearrange(torch.stack([gain, lift]), "n c -> n c 1 1 1")
    return (pixels[torch.from_numpy(order)] * shaped[0] + shaped[1]).clamp(-1, 1)


def crop(clip: StoredClip, rule: CropRule, rng: Generator) -> tuple[Tensor, Tensor]:
    """A crop (3, f, h, w) in [-1, 1], and the weight of its pixels (1, f, h, w)."""
    frames, size = clip.array("frames"), rule.size
    lips = clip.array("lips") if clip.has("lips") else None
    start = int(rng.integers(0, len(frames) - rule.num_frames + 1))
    span = slice(start, start + rule.num_frames)
    room = np.array(frames.shape[1:3]) - size
    if lips is not None and rng.random() < 0.5:
        middle = lips[span].mean(0)
        corner = middle - rng.uniform(0.2, 0.8, 2) * size
    else:
        corner = rng.uniform(0, 1, 2) * (room + 1)
    top, left = (int(value) for value in np.clip(corner, 0, room))
    pixels = to_pixels(frames[span, top : top + size, left : left + size])
    weight = torch.ones_like(pixels[:1])
    if lips is not None:
        weight = lips_weight(lips[span] - np.array((top, left), np.float32), size, size, rule.lips)
    if rng.random() < 0.5:
        pixels, weight = pixels.flip(3), weight.flip(3)
    return recoloured(pixels, rng), weight


def batch_of(clips: Sequence[StoredClip], rule: CropRule, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """The crops (b, 3, f, h, w) of a step, and their weights (b, 1, f, h, w)."""
    rng = np.random.default_rng((seed, step))
    crops = [crop(clips[int(rng.integers(len(clips)))], rule, rng) for _ in range(rule.batch)]
    frames, weights = zip(*crops, strict=True)
    return torch.stack(frames), torch.stack(weights)
