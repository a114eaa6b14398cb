"""A codec of a larger picture, grown out of a finished one: the same latents, a decoder that draws more detail, and
channels for detail.

Grown, the codec encodes means of pixels and repeats each pixel that it decodes; then the decoder's two linear outputs,
the map of patches and the last convolution, are fitted by least squares. That alone beats enlarging pictures. Channels
for detail are a reduced-rank regression of what is left on the patches. Training starts from there.

Axes: b batch, c channels, t latent frames, f pixel frames, h w height and width; n rows of a regression, k channels of
detail.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional

from avatar.types import FRAMES_PER_LATENT
from avatar.vae.conv import Tails
from avatar.vae.light import PATCH_AXES, LightCodec, patch_sizes
from training.codec.crops import CropConfig, load_crops
from training.codec.pca_init import patches_of, untrained_codec
from training.data import StoredClip

# Batches of a fit, and rounds over both outputs.
NUM_BATCHES, NUM_ROUNDS = 16, 2
# Batches of the regression of detail, which has thousands of inputs, and the crops in each of them.
NUM_DETAIL_BATCHES, DETAIL_BATCH_SIZE = 50, 6
# Of the mean diagonal of the normal equations.
RIDGE = 1e-5


@torch.no_grad()
def grow(codec: LightCodec, scale: int) -> LightCodec:
    """Return a codec of scale times the picture with the same latents.

    It encodes means of scale x scale pixels, and repeats each decoded pixel as often. ValueError if the codec is grown
    already.
    """
    if codec.config.scale != 1:
        raise ValueError(f"the codec has the scale {codec.config.scale}; grow one of scale 1")
    grown = LightCodec(replace(codec.config, scale=scale)).requires_grad_(False)
    weights = dict(codec.state_dict())
    each = {"i": scale, "j": scale}
    larger = f"{PATCH_AXES} ... -> c p y x ...", "c p y x ... -> (c p y i x j) ..."
    for name in ("encoder.linear.weight", "encoder.enter.weight"):
        patches = rearrange(weights[name] / scale**2, "o patch 1 1 -> patch o")
        spread = repeat(rearrange(patches, larger[0], **patch_sizes()), larger[1], **each)
        weights[name] = rearrange(spread, "patch o -> o patch 1 1")
    for name in ("decoder.linear.weight", "decoder.linear.bias"):
        weights[name] = repeat(rearrange(weights[name], larger[0], **patch_sizes()), larger[1], **each)
    for kind in ("weight", "bias"):
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


@torch.no_grad()
def deepen(codec: LightCodec, depth: int, seed: int) -> LightCodec:
    """Return the same codec with an encoder of more residual blocks, which change nothing at first."""
    deeper = LightCodec(replace(codec.config, encoder_depth=depth)).requires_grad_(False)
    own = codec.state_dict()
    deeper.load_state_dict({**untrained_codec(deeper.config, seed).state_dict(), **own})
    for name, tensor in deeper.state_dict().items():
        if name not in own and ".leave." in name:
            tensor.zero_()
    return deeper


@torch.no_grad()
def add_detail(
    codec: LightCodec, channels: int, clips: Sequence[StoredClip], crops: CropConfig, seed: int
) -> LightCodec:
    """Return the codec with latents of more channels, which carry what it loses as well as a linear map can.

    Its first channels stay as they are; `channels` is the number of all.
    """
    k, crops = channels - codec.config.channels, replace(crops, batch_size=DETAIL_BATCH_SIZE)
    detail = NormalEquations()
    for step in range(NUM_DETAIL_BATCHES):
        frames, latents = batch(codec, clips, crops, seed, step)
        lost = frames - codec.decoder(latents, Tails())
        detail.add(*(patches_of(each[:, :, FRAMES_PER_LATENT - 1 :], codec.config.scale) for each in (frames, lost)))
    weights = detail.solve()
    # Reduced-rank regression: the leading directions of the outputs that the regression predicts.
    predicted = weights.double() @ detail.inputs @ weights.double().T
    values, vectors = torch.linalg.eigh(predicted / detail.count)
    variances, outward = values[-k:].flip(0), vectors[:, -k:].flip(1).float()
    # The deviation of a channel is the fourth root of its share, as of principal components, of the old channels' size.
    deviations = codec.config.latent_scale * (variances / variances[0]) ** 0.25
    gain = (deviations / variances.sqrt()).float()
    inward = gain[:, None] * (outward.T @ weights)
    more = LightCodec(replace(codec.config, channels=channels)).requires_grad_(False)
    wider = more.state_dict()
    for name, tensor in codec.state_dict().items():
        wider[name].zero_()[tuple(slice(size) for size in tensor.shape)] = tensor
    wider["encoder.linear.weight"][-k:, :, 0, 0], wider["encoder.linear.bias"][-k:] = inward[:, :-1], inward[:, -1]
    wider["decoder.linear.weight"][:, -k:, 0, 0] = outward / gain
    return more


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
    """The normal equations of a linear regression with an intercept, summed over batches.

    inputs: (i + 1, i + 1) products of the inputs, a constant 1 last, summed over `count` rows.
    """

    def __init__(self) -> None:
        self.inputs = self._products = torch.zeros(())
        self.count = 0

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add rows: inputs (n, i), outputs (n, o)."""
        augmented = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)
        self.count += len(inputs)
        self.inputs = self.inputs + (augmented.T @ augmented).double()
        self._products = self._products + (augmented.T @ outputs).double()

    def solve(self) -> Tensor:
        """Return the weights (o, i + 1), the intercept last."""
        ridge = RIDGE * self.inputs.diagonal().mean() * torch.eye(len(self.inputs))
        weights: Tensor = torch.linalg.solve(self.inputs + ridge, self._products).float().T
        return weights


def set_output(convolution: torch.nn.Module, weights: Tensor) -> None:
    """Set weights and biases of a convolution from a regression's (o, i + 1)."""
    shape = convolution.get_parameter("weight").shape
    convolution.get_parameter("weight").copy_(weights[:, :-1].reshape(shape))
    convolution.get_parameter("bias").copy_(weights[:, -1])
