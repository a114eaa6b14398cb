"""The video codec of Wan 2.1: its network, driven so that a stream's state is an argument.

    frames (b, 3, f, H, W) --encode--> latents (b, 16, t, H/8, W/8) --decode--> frames

Latents pass one at a time, because a fresh decoder treats the first one differently; so streamed decoding equals
decoding of the whole, bit for bit.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.backends import cudnn

from avatar.checkpoints.fields import Range, check_ranges
from avatar.types import FRAMES_PER_LATENT
from avatar.vae.wan.network import AutoencoderKLWan, Slots

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
# Times that height and width of a picture are halved.
MAX_HALVINGS = 6
RANGES: dict[str, Range] = {
    **dict.fromkeys(("base_dim", "z_dim"), (1, 1 << 14)),
    **dict.fromkeys(("dim_mult", "num_res_blocks"), (1, 64)),
    "latents_mean": (-1e6, 1e6),
    "latents_std": (1e-6, 1e6),
}


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
        check_ranges(vars(self), RANGES, "network.")
        if len(self.latents_mean) != self.z_dim or len(self.latents_std) != self.z_dim:
            raise ValueError(
                f"network.latents_mean and latents_std must have {self.z_dim} numbers, as z_dim says, "
                f"got {len(self.latents_mean)} and {len(self.latents_std)}"
            )
        halvings = len(self.dim_mult) - 1
        if halvings > MAX_HALVINGS:
            raise ValueError(f"network.dim_mult must have at most {MAX_HALVINGS + 1} numbers, got {halvings + 1}")
        if len(self.temperal_downsample) != halvings or 2 ** sum(self.temperal_downsample) != FRAMES_PER_LATENT:
            raise ValueError(
                f"network.temperal_downsample must have {halvings} entries, two of them true, "
                f"got {self.temperal_downsample}"
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
        fields: dict[str, Any] = {
            name: value for name, value in asdict(config).items() if not name.startswith("latents_")
        }
        with torch.device("meta"):
            network = AutoencoderKLWan(**fields, encodes_only=encodes_only).to(dtype)
        self.network = network.to_empty(device=device).eval().requires_grad_(False)
        self.network.put_channels_last()
        self._device, self._dtype = torch.device(device), dtype
        mean, std = (
            rearrange(torch.tensor(table, device=device), "c -> c 1 1 1")
            for table in (config.latents_mean, config.latents_std)
        )
        # The reciprocal, as in the reference: repeated decoding and encoding amplifies an error in the last bit.
        self._mean, self._scale = mean, 1 / std

    def encode(self, frames: Tensor) -> Tensor:
        frames = frames.to(self._device, self._dtype)
        slots: Slots = [None] * self.network.encoder.num_slots
        starts = range(1, frames.shape[2] - FRAMES_PER_LATENT + 1, FRAMES_PER_LATENT)
        later = (frames[:, :, start : start + FRAMES_PER_LATENT] for start in starts)
        with self._fastest():
            parts = [self.network.encoder(part, slots) for part in (frames[:, :, :1], *later)]
            # Mean and log variance of the posterior; the reference uses the mean.
            raw = self.network.quant_conv(torch.cat(parts, dim=2))[:, : self.channels]
        latents: Tensor = (raw - self._mean) * self._scale
        return latents

    def raw(self, latents: Tensor) -> Tensor:
        """Return the encoder's own latents, with their mean and deviation, of normalised ones (b, c, t, h, w)."""
        return latents.to(self._scale) / self._scale + self._mean

    def new_state(self) -> Slots:
        return [None] * self.network.decoder.num_slots

    def state_bytes(self, state: Slots) -> int:
        return sum(each.nbytes for each in state if each is not None)

    def decode(self, latents: Tensor, state: Slots) -> Tensor:
        raw = self.raw(latents).to(self._dtype)
        decode, prepare = self.network.decoder, self.network.post_quant_conv
        with self._fastest():
            return torch.cat([decode(prepare(latent), state) for latent in torch.split(raw, 1, dim=2)], dim=2)

    def _fastest(self) -> AbstractContextManager[None]:
        """Return a context in which cuDNN measures its kernels for every new shape, of which a video has three."""
        if self._device.type != "cuda":
            return nullcontext()
        flags: AbstractContextManager[None] = cudnn.flags(enabled=True, benchmark=True, allow_tf32=cudnn.allow_tf32)
        return flags


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
