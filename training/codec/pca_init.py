"""Initial weights of the codec: linear maps from the principal components of patches, and the scale of latents.

Axes: b batch, t latent frames, z latent channels, n numbers of a patch, h w height and width of latents.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from avatar.types import FRAMES_PER_LATENT
from avatar.vae.light import PATCH_AXES, LightCodec, LightConfig, patch_sizes
from training.codec.crops import CropConfig, load_crops
from training.data import StoredClip

NUM_BATCHES = 60


def untrained_codec(config: LightConfig, seed: int) -> LightCodec:
    """Return a codec with random weights, drawn from the seed, and a correction of zero."""
    codec = LightCodec(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in codec.named_parameters():
            if name.endswith("weight"):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)
            else:
                parameter.zero_()
        for correction in (codec.encoder.leave, codec.decoder.leave):
            correction.weight.zero_()
    return codec


def set_principal_components(codec: LightCodec, clips: Sequence[StoredClip], crops: CropConfig, seed: int) -> None:
    """Set the codec's linear maps to the leading principal components of patches.

    A channel's standard deviation is the square root of its component's: whitened latents would give components that
    hardly matter the same amplitude, and unscaled ones would leave most channels below the noise.
    """
    channels, scale = codec.config.channels, codec.config.scale
    frames = (load_crops(clips, crops, seed, step)[0] for step in range(NUM_BATCHES))
    patches = torch.cat([patches_of(each, scale) for each in frames]).double()
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    gain = rearrange(values[-channels:].flip(0) ** 0.25, "z -> z 1")
    basis = rearrange(vectors[:, -channels:].flip(1), "n z -> z n")
    inward = {"weight": rearrange(basis / gain, "z n -> z n 1 1"), "bias": -(basis / gain) @ mean}
    outward = {"weight": rearrange(basis * gain, "z n -> n z 1 1"), "bias": mean}
    codec.encoder.linear.load_state_dict(inward)
    codec.decoder.linear.load_state_dict(outward)


def patches_of(frames: Tensor, scale: int = 1) -> Tensor:
    """Cut frames into the patches of whole latents, without the clip's first frame: (b, 3, f, h, w) -> (patches, n)."""
    return rearrange(
        frames[:, :, 1 : 1 + (frames.shape[2] - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT],
        f"b c (t p) (h y) (w x) -> (b t h w) {PATCH_AXES}",
        **patch_sizes(scale),
    )


def normalise_latents(codec: LightCodec, clips: Sequence[StoredClip], crops: CropConfig, seed: int) -> LightCodec:
    """Return the same codec with latents of mean 0 in every channel and variance 1 over all channels together.

    Means and scale are measured on crops like those of training, without each clip's first latent.
    """
    raw = LightCodec(replace(codec.config, latent_scale=1.0)).requires_grad_(False)
    raw.load_state_dict({**codec.state_dict(), "mean": torch.zeros_like(codec.mean)})
    latents = torch.cat([raw.encode(load_crops(clips, crops, seed, step)[0])[:, :, 1:] for step in range(NUM_BATCHES)])
    mean = reduce(latents, "b z t h w -> z 1 1 1", "mean")
    scale = float((latents - mean).pow(2).mean().sqrt())
    result = LightCodec(replace(codec.config, latent_scale=scale))
    result.load_state_dict({**codec.state_dict(), "mean": mean})
    return result
