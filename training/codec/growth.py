"""A codec of a larger picture, grown out of a finished one: the same latents, and a decoder that draws more detail.

Grown, the decoder repeats each pixel of the finished one's; then its two linear outputs, the map of patches and the
last convolution, are fitted by least squares. That alone beats enlarging pictures, and training starts from there.

Axes: b batch, c channels, t latent frames, f pixel frames, h w height and width; n rows of a regression.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional

from avatar.types import FRAMES_PER_LATENT
from avatar.vae.conv import Tails
from avatar.vae.light import PATCH_AXES, PATCH_SIZES, LightCodec, patch_sizes
from training.codec.crops import CropConfig, load_crops
from training.data import StoredClip

# Batches of a fit, and rounds over both outputs.
NUM_BATCHES, NUM_ROUNDS = 16, 2
# Of the mean diagonal of the normal equations.
RIDGE = 1e-5


@torch.no_grad()
def grow(codec: LightCodec, scale: int) -> LightCodec:
    """Return a codec of scale times the picture with the same latents, which repeats each pixel scale x scale times.

    ValueError if the codec is grown already.
    """
    if codec.config.scale != 1:
        raise ValueError(f"the codec has the scale {codec.config.scale}; grow one of scale 1")
    grown = LightCodec(replace(codec.config, scale=scale)).requires_grad_(False)
    weights = dict(codec.state_dict())
    each = {"i": scale, "j": scale}
    for kind in ("weight", "bias"):
        weights[f"decoder.linear.{kind}"] = repeat(
            rearrange(weights[f"decoder.linear.{kind}"], f"{PATCH_AXES} ... -> c p y x ...", **PATCH_SIZES),
            "c p y x ... -> (c p y i x j) ...",
            **each,
        )
        weights[f"decoder.leave.{kind}"] = repeat(
            weights[f"decoder.leave.{kind}"], "(c y x) ... -> (c y i x j) ...", c=3, y=2, **each
        )
    grown.load_state_dict(weights)
    return grown


@torch.no_grad()
def fit_outputs(codec: LightCodec, clips: Sequence[StoredClip], crops: CropConfig, seed: int) -> None:
    """Fit the decoder's outputs to crops by least squares, in turn, each to what the other leaves."""
    decoder, sizes = codec.decoder, patch_sizes(codec.config.scale)
    last = 2 * codec.config.scale
    for _ in range(NUM_ROUNDS):
        patches, pixels = NormalEquations(), NormalEquations()
        for step in range(NUM_BATCHES):
            frames, latents = batch(codec, clips, crops, seed, step)
            left = frames - decoder.correction(decoder.features(latents, Tails()))
            target = rearrange(left, f"b c (t p) (h y) (w x) -> b t h w {PATCH_AXES}", **sizes)
            patches.add(rows(latents[:, 1:]), rows(target[:, 1:]))
        set_output(decoder.linear, patches.solve())
        for step in range(NUM_BATCHES):
            frames, latents = batch(codec, clips, crops, seed, step)
            left = rearrange(frames - decoder.picture(latents), "b c f (h y) (w x) -> b f h w (c y x)", y=last, x=last)
            around = neighbourhoods(decoder.features(latents, Tails()))
            pixels.add(rows(around[:, FRAMES_PER_LATENT:]), rows(left[:, FRAMES_PER_LATENT:]))
        set_output(decoder.leave, pixels.solve())


def batch(
    codec: LightCodec, clips: Sequence[StoredClip], crops: CropConfig, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """Return crops (b, 3, 4 t, h, w), the first frame repeated to a whole patch, and raw latents (b, t, h, w, c)."""
    frames, _ = load_crops(clips, crops, seed, step)
    raw = codec.encode(frames) * codec.config.latent_scale + codec.mean
    first = repeat(frames[:, :, :1], "b c 1 h w -> b c p h w", p=FRAMES_PER_LATENT)
    return torch.cat([first, frames[:, :, 1:]], dim=2), rearrange(raw, "b c t h w -> b t h w c")


def neighbourhoods(features: Tensor) -> Tensor:
    """Return the 3x3 neighbourhoods that a convolution sees, zeros around: (b, f, h, w, c) -> (b, f, h, w, 9 c)."""
    b, _, h, _, _ = features.shape
    unfolded = functional.unfold(rearrange(features, "b f h w c -> (b f) c h w"), 3, padding=1)
    return rearrange(unfolded, "(b f) q (h w) -> b f h w q", b=b, h=h)


def rows(values: Tensor) -> Tensor:
    return rearrange(values, "b t h w c -> (b t h w) c")


class NormalEquations:
    """The normal equations of a linear regression with an intercept, summed over batches."""

    def __init__(self) -> None:
        self._inputs = self._products = torch.zeros(())

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add rows: inputs (n, i), outputs (n, o)."""
        augmented = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)
        self._inputs = self._inputs + (augmented.T @ augmented).double()
        self._products = self._products + (augmented.T @ outputs).double()

    def solve(self) -> Tensor:
        """Return the weights (o, i + 1), the intercept last."""
        ridge = RIDGE * self._inputs.diagonal().mean() * torch.eye(len(self._inputs))
        weights: Tensor = torch.linalg.solve(self._inputs + ridge, self._products).float().T
        return weights


def set_output(convolution: torch.nn.Module, weights: Tensor) -> None:
    """Set weights and biases of a convolution from a regression's (o, i + 1)."""
    shape = convolution.get_parameter("weight").shape
    convolution.get_parameter("weight").copy_(weights[:, :-1].reshape(shape))
    convolution.get_parameter("bias").copy_(weights[:, -1])
