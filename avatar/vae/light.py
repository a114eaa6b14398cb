"""The light codec, a small causal VAE: eight or more times smaller in space, four times in time, 16 or more channels.

A linear map of patches (4 frames of 8x8 pixels) carries the picture; a causal convolutional correction adds detail.

    frames (b, 3, f, H, W) --encode--> latents (b, c, t, H/8, W/8) --decode--> frames

A codec of scale 2 has patches of 16x16 pixels, and as many latents as one of scale 1 has for a picture of half the
size. The networks that generate latents cost the same.

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

from avatar.checkpoints.fields import Range, check_ranges
from avatar.types import FRAMES_PER_LATENT
from avatar.vae.conv import Residual, StepConv, Tails

CHANNELS = 16
SPACE_STRIDE = 8
PATCH_AXES = "(c p y x)"
RANGES: dict[str, Range] = {
    **dict.fromkeys(("wide", "mid", "thin", "channels"), (1, 1 << 14)),
    **dict.fromkeys(("scale", "encoder_depth"), (1, 64)),
    "latent_scale": (1e-6, 1e6),
}


def patch_sizes(scale: int = 1) -> dict[str, int]:
    """Return the sizes of PATCH_AXES. scale: as in `LightConfig`."""
    return {"c": 3, "p": FRAMES_PER_LATENT, "y": SPACE_STRIDE * scale, "x": SPACE_STRIDE * scale}


@dataclass(frozen=True)
class LightConfig:
    """Sizes of a light codec.

    wide, mid, thin: channels at 1/8, 1/4 and 1/2 of the picture's height and width.
    latent_scale: divisor of the centred raw latents; one number for all channels, so that small signals of the picture
        stay small in the latent.
    scale: factor by which the sides of patches are longer than SPACE_STRIDE pixels.
    channels: of the latents.
    encoder_depth: residual blocks of the encoder, which runs once a session.
    """

    wide: int
    mid: int
    thin: int
    latent_scale: float
    scale: int = 1
    channels: int = CHANNELS
    encoder_depth: int = 1

    def __post_init__(self) -> None:
        check_ranges(vars(self), RANGES, "network.")


def tiny() -> LightConfig:
    """The smallest configuration, for 128x128 pictures: 1.5 million parameters."""
    return LightConfig(wide=128, mid=64, thin=24, latent_scale=2.0)


class LightEncoder(nn.Module):
    """The encoder: patches of whole clips to raw latents."""

    def __init__(self, config: LightConfig) -> None:
        super().__init__()
        patch = math.prod(patch_sizes(config.scale).values())
        self.linear = StepConv(patch, config.channels, 1)
        self.enter = StepConv(patch, config.wide, 1)
        self.middle = Residual(config.wide, memory=0)
        self.more = nn.ModuleList(Residual(config.wide, memory) for memory in range(1, config.encoder_depth))
        self.leave = StepConv(config.wide, config.channels, 3)

    def forward(self, patches: Tensor) -> Tensor:
        """patches: (b, t, h, w, c p y x). Returns (b, t, h, w, channels)."""
        tails = Tails()
        steps = self.middle(self.enter(patches), tails)
        for block in self.more:
            steps = block(steps, tails)
        latents: Tensor = self.linear(patches) + self.leave(functional.silu(steps))
        return latents


class LightDecoder(nn.Module):
    """The streaming decoder: raw latents to frames; each upsampling doubles time and space."""

    def __init__(self, config: LightConfig) -> None:
        super().__init__()
        self._patch_sizes = patch_sizes(config.scale)
        self._last = 2 * config.scale
        self.linear = StepConv(config.channels, math.prod(self._patch_sizes.values()), 1)
        self.enter = StepConv(config.channels, config.wide, 3)
        self.wide = Residual(config.wide, memory=0)
        self.wide_too = Residual(config.wide)
        self.to_mid = StepConv(config.wide, 8 * config.mid, 1)
        self.mid = Residual(config.mid, memory=1)
        self.to_thin = StepConv(config.mid, 8 * config.thin, 1)
        self.thin = Residual(config.thin, memory=2)
        self.leave = StepConv(config.thin, 3 * self._last**2, 3)

    def forward(self, latents: Tensor, tails: Tails) -> Tensor:
        """latents: (b, t, h, w, channels). Returns frames (b, 3, 4 t, 8 scale h, 8 scale w)."""
        frames: Tensor = self.picture(latents) + self.correction(self.features(latents, tails))
        return frames

    def picture(self, latents: Tensor) -> Tensor:
        """Return the frames of the linear map of patches."""
        patches = self.linear(latents)
        frames: Tensor = rearrange(patches, f"b t h w {PATCH_AXES} -> b c (t p) (h y) (w x)", **self._patch_sizes)
        return frames

    def features(self, latents: Tensor, tails: Tails) -> Tensor:
        """Return the last features, (b, 4 t, 4 h, 4 w, thin)."""
        steps = self.wide_too(self.wide(self.enter(latents), tails), tails)
        steps = self.mid(upsample(self.to_mid(steps)), tails)
        return functional.silu(self.thin(upsample(self.to_thin(steps)), tails))

    def correction(self, features: Tensor) -> Tensor:
        """Return the correction of the frames that the last features give."""
        pixels = self.leave(features)
        frames: Tensor = rearrange(pixels, "b f h w (c y x) -> b c f (h y) (w x)", y=self._last, x=self._last)
        return frames


def upsample(steps: Tensor) -> Tensor:
    """Double time, height and width by channels-to-pixels: (b, t, h, w, 8 c) -> (b, 2 t, 2 h, 2 w, c)."""
    return rearrange(steps, "b t h w (c p y x) -> b (t p) (h y) (w x) c", p=2, y=2, x=2)


class LightCodec(nn.Module):
    """A `Codec` that is also the module to train; `forward` reconstructs whole clips."""

    channels: int
    space_stride: int
    # The decoder uses one past step at each of its three rates: one, two and four steps a latent.
    history = math.ceil(1 + 1 / 2 + 1 / 4)
    mean: Tensor

    def __init__(self, config: LightConfig) -> None:
        super().__init__()
        self.config = config
        self.channels, self.space_stride = config.channels, SPACE_STRIDE * config.scale
        self.encoder = LightEncoder(config)
        self.decoder = LightDecoder(config)
        # (c, 1, 1, 1): means of the raw latents' channels over the training data.
        self.register_buffer("mean", torch.zeros(config.channels, 1, 1, 1))

    def forward(self, frames: Tensor) -> Tensor:
        """Encode and decode frames (b, 3, f, H, W) in [-1, 1], f = 1 + 4 k; returns the same shape."""
        return self.decode(self.encode(frames), self.new_state())

    def encode(self, frames: Tensor) -> Tensor:
        first = repeat(frames[:, :, :1], "b c 1 h w -> b c p h w", p=FRAMES_PER_LATENT)
        whole = 1 + (frames.shape[2] - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT
        return self.encode_steps(torch.cat([first, frames[:, :, 1:whole]], dim=2))

    def encode_steps(self, frames: Tensor) -> Tensor:
        """Return the latents (b, c, t, h, w) of frames (b, 3, 4 t, H, W) that do not begin with a still one."""
        patches = rearrange(
            frames.to(self.encoder.linear.weight),
            f"b c (t p) (h y) (w x) -> b t h w {PATCH_AXES}",
            **patch_sizes(self.config.scale),
        )
        raw = rearrange(self.encoder(patches), "b t h w c -> b c t h w")
        latents: Tensor = (raw - self.mean) / self.config.latent_scale
        return latents

    def new_state(self) -> Tails:
        return Tails()

    def state_bytes(self, state: Tails) -> int:
        return state.num_bytes

    def decode(self, latents: Tensor, state: Tails) -> Tensor:
        # The stream's first latent stands for one frame; its patch repeats it four times, and the last is kept.
        hidden = FRAMES_PER_LATENT - 1 if state.is_fresh else 0
        raw = (latents.to(self.mean) * self.config.latent_scale + self.mean).to(self.decoder.linear.weight)
        frames: Tensor = self.decoder(rearrange(raw, "b c t h w -> b t h w c").contiguous(), state)
        return frames[:, :, hidden:]
