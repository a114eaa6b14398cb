"""The tiny decoder of Wan 2.1 latents, `taew2_1` or `lighttaew2_1`: 25 times less arithmetic than Wan's own, and a
lower quality.

    latents (b, 16, t, h, w) --soft clamp, convolutions in space, memory blocks--> frames (b, 3, f, 8 h, 8 w)

Its only connections in time are nine memory blocks, each of which also sees its input of the step before. A latent
frame is one step; two layers turn each step into two, so that it leaves as four frames. Latent frames always pass one
at a time, so that streamed decoding equals decoding of the whole, bit for bit.

Axes: b batch, t steps, h w height and width, c channels; latents and frames as in `avatar.vae.codec`.
Source: the architecture of madebyollin/taehv at 1f14a568; written anew.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from avatar.types import FRAMES_PER_LATENT
from avatar.vae.conv import StepConv, Tails
from avatar.vae.wan import WanCodec

Latents = Literal["normalised", "raw"]
# Channels at 1/8, 1/4, 1/2 and all of the frames' height and width.
WIDTHS = (256, 128, 64, 64)
# Height and width of latents grow by this.
SPACE_STRIDE = 8
LATENT_CHANNELS = 16
CLAMP = 3.0


@dataclass(frozen=True)
class TinyDecoderConfig:
    """Configuration of a tiny decoder, as in its config.json.

    latents: that it takes: `normalised` to about unit variance, as networks generate them, or `raw`, as Wan's encoder
        makes them. The weights do not show it.
    """

    latents: Latents

    def __post_init__(self) -> None:
        if self.latents not in get_args(Latents):
            raise ValueError(f"latents must be {' or '.join(get_args(Latents))}, got {self.latents!r}")


class SoftClamp(nn.Module):
    """Limit values smoothly to -CLAMP..CLAMP."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / CLAMP) * CLAMP


class MemoryBlock(nn.Module):
    """A residual block of three convolutions; the first also sees the block's input of the step before.

    number: of the module in the decoder, its key in `Tails`.
    """

    def __init__(self, width: int, number: int) -> None:
        super().__init__()
        self.number = number
        self.conv = nn.Sequential(
            StepConv(2 * width, width, 3), nn.ReLU(), StepConv(width, width, 3), nn.ReLU(), StepConv(width, width, 3)
        )

    def forward(self, steps: Tensor, tails: Tails) -> Tensor:
        """steps, result: (b, t, h, w, c)."""
        change: Tensor = self.conv(torch.cat([steps, tails.extend(self.number, steps)], dim=-1))
        return torch.relu(steps + change)


class Growth(nn.Module):
    """Double height and width, and turn each step into `times` steps: (b, t, h, w, c) -> (b, times t, 2 h, 2 w, c).

    Published decoders enlarge first. The convolution of 1x1 gives the same ahead of it, for a quarter of the work.
    """

    def __init__(self, width: int, times: int) -> None:
        super().__init__()
        self.times = times
        self.conv = StepConv(width, times * width, 1, bias=False)

    def forward(self, steps: Tensor) -> Tensor:
        grown: Tensor = self.conv(steps)
        return repeat(grown, "b t h w (p c) -> b (t p) (h y) (w x) c", p=self.times, y=2, x=2)


class TinyDecoder(nn.Module):
    """The network, with the names and the numbering of the published files."""

    def __init__(self, widths: tuple[int, int, int, int] = WIDTHS) -> None:
        super().__init__()
        layers: list[nn.Module] = [SoftClamp(), StepConv(LATENT_CHANNELS, widths[0], 3), nn.ReLU()]
        for width, next_width, times in zip(widths, widths[1:], (1, 2, 2), strict=False):
            layers += [MemoryBlock(width, len(layers) + i) for i in range(3)]
            layers += [nn.Identity(), Growth(width, times), StepConv(width, next_width, 3, bias=False)]
        self.decoder = nn.ModuleList([*layers, nn.ReLU(), StepConv(widths[-1], 3, 3)])

    def forward(self, latents: Tensor, tails: Tails) -> Tensor:
        """Decode the next latent frames (b, t, h, w, 16) to frames (b, 4 t, 8 h, 8 w, 3), about [0, 1]."""
        steps = latents
        for layer in self.decoder:
            steps = layer(steps, tails) if isinstance(layer, MemoryBlock) else layer(steps)
        return steps


class TinyDecoderCodec:
    """A `Codec` that encodes as Wan's does and decodes with the tiny decoder."""

    def __init__(self, wan: WanCodec, decoder: TinyDecoder, config: TinyDecoderConfig) -> None:
        """wan: need not be able to decode. ValueError if its latents have other sizes than the decoder's."""
        self.channels, self.space_stride = wan.channels, wan.space_stride
        if (self.channels, self.space_stride) != (LATENT_CHANNELS, SPACE_STRIDE):
            raise ValueError(
                f"a tiny decoder takes latents of {LATENT_CHANNELS} channels at 1/{SPACE_STRIDE} of the picture's "
                f"size, the VAE has {self.channels} at 1/{self.space_stride}"
            )
        # Three memory blocks at one step a latent, three at one, and three at two.
        self.history = math.ceil(3 + 3 + 3 / 2)
        self.decoder = decoder
        self._wan, self._config = wan, config

    def encode(self, frames: Tensor) -> Tensor:
        return self._wan.encode(frames)

    def new_state(self) -> Tails:
        return Tails(starts_at_zero=True)

    def state_bytes(self, state: Tails) -> int:
        return state.num_bytes

    def decode(self, latents: Tensor, state: Tails) -> Tensor:
        weight = next(self.decoder.parameters())
        taken = self._wan.raw(latents) if self._config.latents == "raw" else latents
        steps = rearrange(taken.to(weight), "b c t h w -> b t h w c").contiguous()
        # The first latent frame of a stream stands for one frame; the last of its four is kept.
        hidden = FRAMES_PER_LATENT - 1 if state.is_fresh else 0
        frames = torch.cat([self.decoder(step, state) for step in torch.split(steps, 1, dim=1)], dim=1)
        return rearrange(2 * frames[:, hidden:] - 1, "b f h w c -> b c f h w")
