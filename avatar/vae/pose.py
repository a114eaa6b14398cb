"""Latents of a pose video, the input of the network's pose (condition) encoder.

Source: the reference implementation of arXiv 2512.04677. Axes: c channels, t latent frames, f pixel frames, h w height
and width of latents, H W of frames.
"""

from collections.abc import Iterator
from itertools import islice, repeat

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from avatar.vae.codec import Codec, State
from avatar.vae.picture.fitting import fit_image
from avatar.vae.picture.reading import to_pixels
from avatar.vae.picture.rule import Fit, Size

# Frames after a video's end are black.
BLACK = -1.0


def pose_latents(
    codec: Codec[State], frames: Iterator[NDArray[np.uint8]], size: Size, fit: Fit, clip_frames: int
) -> Iterator[Tensor]:
    """Yield the latents (c, t, h, w) float32 of clip after clip, without end; t = clip_frames / 4.

    frames: (H, W, 3) RGB at the video's rate, of any size. size: (width, height) of the video. fit: of the frames.
    Each clip is encoded independently, with its first frame repeated once in front and that frame's latent dropped.
    """
    width, height = size
    missing = torch.full((3, height, width), BLACK)
    while shown := [_fitted(frame, size, fit) for frame in islice(frames, clip_frames)]:
        yield _encode(codec, [*shown, *repeat(missing, clip_frames - len(shown))])
    yield from repeat(_encode(codec, [missing] * clip_frames))


def _fitted(frame: NDArray[np.uint8], size: Size, fit: Fit) -> Tensor:
    """Return a frame (H, W, 3) RGB at the video's size, (3, H, W) in [-1, 1]."""
    return to_pixels(torch.from_numpy(np.array(fit_image(Image.fromarray(frame), size, fit))))


def _encode(codec: Codec[State], clip: list[Tensor]) -> Tensor:
    with torch.inference_mode():
        latents = codec.encode(rearrange([clip[0], *clip], "f c h w -> 1 c f h w"))
    return latents[0, :, 1:].float().cpu()
