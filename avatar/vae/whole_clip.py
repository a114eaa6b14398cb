"""Decoding clip by clip, as the reference implementation does on one GPU; a stream (`vae.py`) decodes block by block.

The still clip of the picture is longer, the sink is its second latent, and no decoder state is carried: each clip is
decoded after the latents of the 365 frames before it, which are encoded anew for every clip.

Source: `causal_s2v_pipeline.py` of arXiv 2512.04677. Axes: c channels, t latent frames, f pixel frames, h w height and
width of latents, H W of frames.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from avatar.types import FRAMES_PER_LATENT, MOTION_LATENTS
from avatar.vae.vae import HIDDEN_FRAMES, MOTION_FRAMES, Vae

# Frames that precede a clip in its decoding.
WINDOW_FRAMES = 5 * MOTION_FRAMES


def encode_picture(vae: Vae[Any], rgb: Tensor) -> tuple[Tensor, Tensor]:
    """Encode a picture (H, W, 3) uint8 to motion latents (c, 19, h, w) and the sink (c, 1, h, w), both float32."""
    with torch.inference_mode():
        latents = vae.codec.encode(vae.still_clip(rgb, WINDOW_FRAMES))[0].float().cpu()
    # The codec is causal: the second latent depends on the clip's first five frames.
    return latents[:, -MOTION_LATENTS:], latents[:, 1:2]


def decode_clips(vae: Vae[Any], rgb: Tensor, clips: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield each clip's frames (3, f, H, W) float32 in [-1, 1]; f = 4 t, three fewer in the first.

    rgb: the picture (H, W, 3) uint8. clips: latents (c, t, h, w) in order.
    """
    window, hidden = vae.still_clip(rgb, WINDOW_FRAMES), HIDDEN_FRAMES
    for clip in clips:
        with torch.inference_mode():
            motion = vae.codec.encode(window)
            latents = torch.cat([motion, clip[None].to(motion)], dim=2)
            decoded = vae.codec.decode(latents, vae.codec.new_state())
        frames = decoded[:, :, hidden - clip.shape[1] * FRAMES_PER_LATENT :].float().clamp(-1, 1).cpu()
        hidden = 0
        # A clip moves the window by at most MOTION_FRAMES, however long it is.
        recent = frames[:, :, -MOTION_FRAMES:]
        window = torch.cat([window[:, :, recent.shape[2] :], recent], dim=2)
        yield frames[0]
