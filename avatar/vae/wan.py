"""The video codec of Wan 2.1, as diffusers' AutoencoderKLWan, driven so that a stream's state is an argument.

    frames (b, 3, f, H, W) --encode--> latents (b, 16, t, H/8, W/8) --decode--> frames

diffusers' own encode and decode keep their caches on the module and clear them in every call. Here the module's
encoder and decoder are called directly: they take a list of cache slots, one per causal convolution, each the last two
frames of its input. Latents pass one at a time, because a fresh decoder treats the first one differently and returns
the wrong number of frames for several; so streamed decoding equals decoding of the whole, bit for bit.

This is the only module that imports diffusers, which is slow to import.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from einops import rearrange
from torch import Tensor, nn

from avatar.types import FRAMES_PER_LATENT

# Mean and standard deviation of Wan 2.1's raw latents, channel by channel. Source: published with its weights.
# fmt: off
WAN_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)
WAN_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)
# fmt: on
# A slot is empty, holds frames, or a marker that the temporal upsampler sets after a stream's first latent.
Slots = list[Tensor | str | None]


@dataclass(frozen=True)
class WanConfig:
    """Fields of AutoencoderKLWan, under its names and with Wan 2.1's values.

    base_dim: channels at full resolution; dim_mult: their multiples at each level down.
    num_res_blocks: residual blocks a level; the decoder has one more.
    temperal_downsample: True if time halves between a level and the next.
    latents_mean, latents_std: (z_dim,) of raw latents; normalised latents are (raw - mean) / std.
    """

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = WAN_MEAN
    latents_std: tuple[float, ...] = WAN_STD

    def __post_init__(self) -> None:
        if len(self.latents_mean) != self.z_dim or len(self.latents_std) != self.z_dim:
            raise ValueError(
                f"latents_mean and latents_std must have {self.z_dim} numbers, as z_dim says, "
                f"got {len(self.latents_mean)} and {len(self.latents_std)}"
            )
        halvings = len(self.dim_mult) - 1
        if len(self.temperal_downsample) != halvings or 2 ** sum(self.temperal_downsample) != FRAMES_PER_LATENT:
            raise ValueError(
                f"temperal_downsample must have {halvings} entries, two of them true, got {self.temperal_downsample}"
            )


class WanCodec:
    """A `Codec` around one AutoencoderKLWan."""

    def __init__(
        self,
        config: WanConfig,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        encodes_only: bool = False,
    ) -> None:
        """Weights are undefined until they are loaded into `network`. encodes_only: without the decoder's modules."""
        self.channels = config.z_dim
        self.space_stride = 1 << len(config.dim_mult) - 1
        self.history = past_latents(config)
        with torch.device("meta"):
            # diffusers adds these fields to lists.
            fields = {name: [*value] if isinstance(value, tuple) else value for name, value in asdict(config).items()}
            network: Any = AutoencoderKLWan(**fields)  # type: ignore[no-untyped-call]
        if encodes_only:
            del network.decoder, network.post_quant_conv
        # nn.Module's `to`: diffusers' own warns about modules to keep in float32, of which there are none.
        nn.Module.to(network, dtype)
        self.network = network.to_empty(device=device).eval().requires_grad_(False)
        mean, std = (
            rearrange(torch.tensor(table, device=device), "c -> c 1 1 1")
            for table in (config.latents_mean, config.latents_std)
        )
        # The reciprocal, as in the reference: repeated decoding and encoding amplifies an error in the last bit.
        self._mean, self._scale = mean, 1 / std

    def encode(self, frames: Tensor) -> Tensor:
        frames = frames.to(self.network.device, self.network.dtype)
        slots: Slots = [None] * self.network._cached_conv_counts["encoder"]
        starts = range(1, frames.shape[2] - FRAMES_PER_LATENT + 1, FRAMES_PER_LATENT)
        later = (frames[:, :, start : start + FRAMES_PER_LATENT] for start in starts)
        parts = [self.network.encoder(part, feat_cache=slots, feat_idx=[0]) for part in (frames[:, :, :1], *later)]
        # Mean and log variance of the posterior; the reference uses the mean.
        raw = self.network.quant_conv(torch.cat(parts, dim=2))[:, : self.channels]
        latents: Tensor = (raw - self._mean) * self._scale
        return latents

    def raw(self, latents: Tensor) -> Tensor:
        """Return the encoder's own latents, with their mean and deviation, of normalised ones (b, c, t, h, w)."""
        return latents.to(self._scale) / self._scale + self._mean

    def new_state(self) -> Slots:
        return [None] * self.network._cached_conv_counts["decoder"]

    def decode(self, latents: Tensor, state: Slots) -> Tensor:
        raw = self.raw(latents).to(self.network.dtype)
        return torch.cat(
            [
                self.network.decoder(self.network.post_quant_conv(latent), feat_cache=state, feat_idx=[0])
                for latent in torch.split(raw, 1, dim=2)
            ],
            dim=2,
        )


def past_latents(config: WanConfig) -> int:
    """Return the past latents that the decoder depends on.

    A sum over the convolutions in time: each uses two past frames, at one, two or four frames a latent.
    """
    rate, past = 1, 2.0 * (1 + 4)  # the input convolution, and two residual blocks in the middle
    for doubles in (*reversed(config.temperal_downsample), False):
        past += 2 * 2 * (config.num_res_blocks + 1) / rate
        if doubles:
            past += 2 / rate
            rate *= 2
    past += 2 / rate  # the output convolution
    return math.ceil(past)
