"""The light codec, a small causal VAE: eight times smaller in space, four times in time, 16 channels.

A linear map of patches (4 frames of 8x8 pixels) carries the picture; a causal convolutional correction adds detail.

    frames (b, 3, f, H, W) --encode--> latents (b, 16, t, H/8, W/8) --decode--> frames

In time the first frame stands for a whole patch: f = 1 + 4 (t - 1), as with the Wan codec. Streamed decoding equals
decoding of the whole to 1e-6: the arithmetic is the same, but the order of a convolution kernel's sums depends on the
number of steps.

Axes: b batch, c channels, t latent frames, f pixel frames, h w height and width of latents; in a patch p frames, y x
rows and columns.
"""

import math
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional

from avatar.types import FRAMES_PER_LATENT
from avatar.vae.conv import Residual, StepConv, Tails

CHANNELS = 16
SPACE_STRIDE = 8
PATCH_AXES = "(c p y x)"
PATCH_SIZES = {"c": 3, "p": FRAMES_PER_LATENT, "y": SPACE_STRIDE, "x": SPACE_STRIDE}
PATCH = math.prod(PATCH_SIZES.values())


@dataclass(frozen=True)
class LightConfig:
    """Sizes of a light codec.

    wide, mid, thin: channels at 1/8, 1/4 and 1/2 of the picture's height and width.
    latent_scale: divisor of the centred raw latents; one number for all channels, so that small signals of the picture
        stay small in the latent.
    """

    wide: int
    mid: int
    thin: int
    latent_scale: float

    def __post_init__(self) -> None:
        if min(self.wide, self.mid, self.thin, self.latent_scale) <= 0:
            raise ValueError(f"a light codec's sizes and its latent scale must be positive: {self}")


def tiny() -> LightConfig:
    """The embedded default's configuration: 1.5 million parameters."""
    return LightConfig(wide=128, mid=64, thin=24, latent_scale=2.0)


class LightEncoder(nn.Module):
    """The encoder: patches of whole clips to raw latents."""

    def __init__(self, config: LightConfig) -> None:
        super().__init__()
        self.linear = StepConv(PATCH, CHANNELS, 1)
        self.enter = StepConv(PATCH, config.wide, 1)
        self.middle = Residual(config.wide, memory=0)
        self.leave = StepConv(config.wide, CHANNELS, 3)

    def forward(self, patches: Tensor) -> Tensor:
        """patches: (b, t, c p y x, h, w). Returns (b, t, 16, h, w)."""
        steps = self.middle(self.enter(patches), Tails())
        latents: Tensor = self.linear(patches) + self.leave(functional.silu(steps))
        return latents


class LightDecoder(nn.Module):
    """The streaming decoder: raw latents to frames; each upsampling doubles time and space."""

    def __init__(self, config: LightConfig) -> None:
        super().__init__()
        self.linear = StepConv(CHANNELS, PATCH, 1)
        self.enter = StepConv(CHANNELS, config.wide, 3)
        self.wide = Residual(config.wide, memory=0)
        self.wide_too = Residual(config.wide)
        self.to_mid = StepConv(config.wide, 8 * config.mid, 1)
        self.mid = Residual(config.mid, memory=1)
        self.to_thin = StepConv(config.mid, 8 * config.thin, 1)
        self.thin = Residual(config.thin, memory=2)
        self.leave = StepConv(config.thin, 3 * 2 * 2, 3)

    def forward(self, latents: Tensor, tails: Tails) -> Tensor:
        """latents: (b, t, 16, h, w). Returns frames (b, 3, 4 t, 8 h, 8 w)."""
        steps = self.wide_too(self.wide(self.enter(latents), tails), tails)
        steps = self.mid(upsample(self.to_mid(steps)), tails)
        steps = self.thin(upsample(self.to_thin(steps)), tails)
        correction = rearrange(self.leave(functional.silu(steps)), "b f (c y x) h w -> b c f (h y) (w x)", y=2, x=2)
        picture = rearrange(self.linear(latents), f"b t {PATCH_AXES} h w -> b c (t p) (h y) (w x)", **PATCH_SIZES)
        frames: Tensor = picture + correction
        return frames


def upsample(steps: Tensor) -> Tensor:
    """Double time, height and width by channels-to-pixels: (b, t, 8 c, h, w) -> (b, 2 t, c, 2 h, 2 w)."""
    return rearrange(steps, "b t (c p y x) h w -> b (t p) c (h y) (w x)", p=2, y=2, x=2)


class LightCodec(nn.Module):
    """A `Codec` that is also the module to train; `forward` reconstructs whole clips."""

    channels = CHANNELS
    space_stride = SPACE_STRIDE
    # The decoder uses one past step at each of its three rates: one, two and four steps a latent.
    history = math.ceil(1 + 1 / 2 + 1 / 4)
    mean: Tensor

    def __init__(self, config: LightConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = LightEncoder(config)
        self.decoder = LightDecoder(config)
        # (c, 1, 1, 1): means of the raw latents' channels over the training data.
        self.register_buffer("mean", torch.zeros(CHANNELS, 1, 1, 1))

    def forward(self, frames: Tensor) -> Tensor:
        """Encode and decode frames (b, 3, f, H, W) in [-1, 1], f = 1 + 4 k; returns the same shape."""
        return self.decode(self.encode(frames), self.new_state())

    def encode(self, frames: Tensor) -> Tensor:
        frames = frames.to(self.mean)
        first = repeat(frames[:, :, :1], "b c 1 h w -> b c p h w", p=FRAMES_PER_LATENT)
        whole = 1 + (frames.shape[2] - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT
        patches = rearrange(
            torch.cat([first, frames[:, :, 1:whole]], dim=2),
            f"b c (t p) (h y) (w x) -> b t {PATCH_AXES} h w",
            **PATCH_SIZES,
        )
        raw = rearrange(self.encoder(patches), "b t c h w -> b c t h w")
        latents: Tensor = (raw - self.mean) / self.config.latent_scale
        return latents

    def new_state(self) -> Tails:
        return Tails()

    def decode(self, latents: Tensor, state: Tails) -> Tensor:
        # The stream's first latent stands for one frame; its patch repeats it four times, and the last is kept.
        hidden = FRAMES_PER_LATENT - 1 if state.is_fresh else 0
        raw = latents.to(self.mean) * self.config.latent_scale + self.mean
        frames: Tensor = self.decoder(rearrange(raw, "b c t h w -> b t c h w"), state)
        return frames[:, :, hidden:]
