"""Where the codec's training begins: the linear map as the principal components of patches, and the latents' scale.

Axes: b batch, t latent frames, z latent channels, n numbers of a patch, h w height and width of latents.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from einops import rearrange, reduce
from torch import Tensor

from avatar.types import FRAMES_PER_LATENT
from avatar.vae.light import CHANNELS, PATCH_AXES, PATCH_SIZES, LightCodec
from training.codec.crops import CropRule, batch_of
from training.data import StoredClip

NUM_BATCHES = 60


def principal_components(codec: LightCodec, clips: Sequence[StoredClip], rule: CropRule, seed: int) -> None:
    """Set the codec's linear maps to the components of patches that say most.

    A channel's deviation is the root of its component's: whitened latents would be as loud where they hardly matter,
    and untouched ones so quiet in most channels that noise drowns them.
    """
    patches = torch.cat([patches_of(batch_of(clips, rule, seed, step)[0]) for step in range(NUM_BATCHES)]).double()
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    gain = rearrange(values[-CHANNELS:].flip(0) ** 0.25, "z -> z 1")
    basis = rearrange(vectors[:, -CHANNELS:].flip(1), "n z -> z n")
    inward = {"weight": rearrange(basis / gain, "z n -> z n 1 1"), "bias": -(basis / gain) @ mean}
    outward = {"weight": rearrange(basis * gain, "z n -> n z 1 1"), "bias": mean}
    codec.encoder.linear.load_state_dict(inward)
    codec.decoder.linear.load_state_dict(outward)


def patches_of(frames: Tensor) -> Tensor:
    """All patches of whole latents, the clip's first frame left out: (b, 3, f, h, w) -> (patches, n)."""
    return rearrange(
        frames[:, :, 1 : 1 + (frames.shape[2] - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT],
        f"b c (t p) (h y) (w x) -> (b t h w) {PATCH_AXES}",
        **PATCH_SIZES,
    )


def normalised(codec: LightCodec, clips: Sequence[StoredClip], rule: CropRule, seed: int) -> LightCodec:
    """The same codec whose latents have mean 0 in every channel, and variance 1 over all of them together.

    Means and scale are of latents behind a clip's first, over crops that training could have seen.
    """
    raw = LightCodec(replace(codec.config, latent_scale=1.0)).requires_grad_(False)
    raw.load_state_dict({**codec.state_dict(), "mean": torch.zeros_like(codec.mean)})
    latents = torch.cat([raw.encode(batch_of(clips, rule, seed, step)[0])[:, :, 1:] for step in range(NUM_BATCHES)])
    mean = reduce(latents, "b z t h w -> z 1 1 1", "mean")
    scale = float((latents - mean).pow(2).mean().sqrt())
    result = LightCodec(replace(codec.config, latent_scale=scale))
    result.load_state_dict({**codec.state_dict(), "mean": mean})
    return result
