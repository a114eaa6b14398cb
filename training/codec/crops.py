"""Batches of crops for the codec, drawn from clips, seed and step alone, so a resumed run sees the crops it would have.

Half of the crops contain the lips, where their position is known. Crops are mirrored and recoloured at random.

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

# Extents of the extra loss weight around the centre of the lips and of each eye, rows and columns, by the picture's
# height.
LIPS_EXTENT, EYE_EXTENT = (11 / 128, 16 / 128), (8 / 128, 9 / 128)
# Place of the eyes' middle above the lips' centre, more the further the head looks down; shift to the left for each
# radian of yaw; half the distance of the eyes. By the picture's height, measured on synthetic people.
EYES_ABOVE, EYES_ABOVE_PITCH, EYES_YAW, EYES_APART = 0.262, 0.125, 0.098, 0.125


@dataclass(frozen=True)
class CropConfig:
    """Composition of a batch.

    size: of a crop in pixels, a multiple of 8. num_frames: 1 + 4 k. lips_gain: extra loss weight at the lips' centre.
    """

    batch_size: int = 4
    size: int = 64
    num_frames: int = 13
    lips_gain: float = 4.0


def to_pixels(frames: NDArray[np.uint8]) -> Tensor:
    """Convert bytes (..., f, h, w, 3) to float32 (..., 3, f, h, w) in [-1, 1]."""
    return rearrange(torch.from_numpy(np.array(frames)), "... f h w c -> ... c f h w") / 127.5 - 1


def eyes_of(lips: NDArray[np.floating], pose: NDArray[np.floating], picture_height: int) -> list[NDArray[np.floating]]:
    """Return where synthetic people's two eyes are, (f, 2) rows and columns each: lips (f, 2), pose (f, 3)."""
    pitch, yaw, roll = pose.T
    up, right = np.stack([-np.cos(roll), -np.sin(roll)], 1), np.stack([-np.sin(roll), np.cos(roll)], 1)
    above = (EYES_ABOVE + EYES_ABOVE_PITCH * pitch)[:, None] * up - (EYES_YAW * yaw)[:, None] * right
    return [lips + picture_height * (above + side * EYES_APART * right) for side in (-1, 1)]


def lips_weight(
    lips: NDArray[np.floating],
    height: int,
    width: int,
    gain: float,
    picture_height: int | None = None,
    eyes: Sequence[NDArray[np.floating]] = (),
) -> Tensor:
    """Return loss weights of pixels, of mean 1 per frame: lips (f, 2) rows and columns -> (1, f, h, w).

    gain: extra weight at the centre of lips and eyes. picture_height: of the whole picture, where h x w is a part of
    it. eyes: from `eyes_of`.
    """
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    near = torch.zeros(())
    for places, extent in ((lips, LIPS_EXTENT), *((eye, EYE_EXTENT) for eye in eyes)):
        high, wide = np.array(extent) * (picture_height or height)
        row, column = rearrange(torch.from_numpy(np.array(places, np.float32)), "f (a h w) -> a f h w", h=1, w=1)
        near = torch.maximum(near, torch.exp(-(((rows - row) / high) ** 2) - ((columns - column) / wide) ** 2))
    weight = 1 + gain * near
    return (weight / weight.mean((1, 2), keepdim=True))[None]


def recolour(pixels: Tensor, rng: Generator) -> Tensor:
    """Change gain and offset of the channels: (3, f, h, w) in [-1, 1] to the same.

    Channels keep their order: people of other colours than people have would teach networks to ignore the reference's.
    """
    gain = torch.from_numpy(rng.uniform(0.85, 1.15, 3).astype(np.float32))
    offset = torch.from_numpy((rng.uniform(-0.08, 0.08) + rng.uniform(-0.04, 0.04, 3)).astype(np.float32))
    gain, offset = rearrange(torch.stack([gain, offset]), "n c -> n c 1 1 1")
    recoloured: Tensor = (pixels * gain + offset).clamp(-1, 1)
    return recoloured


def crop(clip: StoredClip, config: CropConfig, rng: Generator) -> tuple[Tensor, Tensor]:
    """Draw a crop (3, f, h, w) in [-1, 1] and the loss weights of its pixels (1, f, h, w)."""
    size = config.size
    lips = clip.array("lips") if clip.has("lips") else None
    start = int(rng.integers(0, clip.num_frames - config.num_frames + 1))
    span = slice(start, start + config.num_frames)
    frames = clip.frames(span)
    max_corner = np.array(frames.shape[1:3]) - size
    if lips is not None and rng.random() < 0.5:
        middle = lips[span].mean(0)
        corner = middle - rng.uniform(0.2, 0.8, 2) * size
    else:
        corner = rng.uniform(0, 1, 2) * (max_corner + 1)
    top, left = (int(value) for value in np.clip(corner, 0, max_corner))
    pixels = to_pixels(frames[:, top : top + size, left : left + size])
    weight = torch.ones_like(pixels[:1])
    if lips is not None:
        place = lips[span] - np.array((top, left), np.float32)
        weight = lips_weight(place, size, size, config.lips_gain, frames.shape[1])
    if rng.random() < 0.5:
        pixels, weight = pixels.flip(3), weight.flip(3)
    return recolour(pixels, rng), weight


def load_crops(clips: Sequence[StoredClip], config: CropConfig, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Load a step's crops (b, 3, f, h, w) and their loss weights (b, 1, f, h, w)."""
    rng = np.random.default_rng((seed, step))
    crops = [crop(clips[int(rng.integers(len(clips)))], config, rng) for _ in range(config.batch_size)]
    frames, weights = zip(*crops, strict=True)
    return torch.stack(frames), torch.stack(weights)
