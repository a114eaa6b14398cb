"""The network of Wan 2.1's VAE, under diffusers' names of its parts, which checkpoints in our layout have too.

    frames (b, 3, f, H, W) --encoder--> 2 z channels --quant_conv--> mean and log variance (b, 2 z, t, H/8, W/8)
    latents (b, z, t, h, w) --post_quant_conv, decoder--> frames (b, 3, f, 8 h, 8 w)

A stream's state is an argument: a slot for every convolution in time, with the last frames of its input. A clip passes
in parts, of which the first is one frame or latent frame, and stands alone.

At the widths of the public weights a GPU spends its time on memory traffic, not on arithmetic. So channels are last in
memory, where a normalisation is one kernel and a convolution needs no other order; nothing is cast, frames are joined
with those before them once, and the convolution pads. `tests/vae/test_traffic.py` counts the bytes.

Axes: b batch, c channels, t frames or latent frames, h w height and width.
"""

from collections.abc import Iterator, Sequence
from itertools import count, pairwise

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

# The last frames (b, c, t, h, w) of every convolution's input, by its slot; None before a stream's first part.
Slots = list[Tensor | None]

# The least length of a pixel's channels as a vector, which only zeros are below.
SHORTEST = 1e-12
# Past frames that a convolution in time sees.
PAST_FRAMES = 2


class AutoencoderKLWan(nn.Module):
    """The encoder and the decoder of one checkpoint."""

    def __init__(
        self,
        base_dim: int,
        z_dim: int,
        dim_mult: Sequence[int],
        num_res_blocks: int,
        temperal_downsample: Sequence[bool],
        *,
        encodes_only: bool = False,
    ) -> None:
        """Sizes are those of `WanConfig`. encodes_only: without the decoder's modules."""
        super().__init__()
        widths = [base_dim * multiple for multiple in dim_mult]
        self.encoder = Encoder(widths, z_dim, num_res_blocks, temperal_downsample)
        self.quant_conv = nn.Conv3d(2 * z_dim, 2 * z_dim, 1)
        if not encodes_only:
            self.post_quant_conv = nn.Conv3d(z_dim, z_dim, 1)
            self.decoder = Decoder(widths[::-1], z_dim, num_res_blocks, temperal_downsample[::-1])

    def put_channels_last(self) -> None:
        """Store the weights of convolutions with channels last; a convolution's result follows its weights."""
        for parameter in self.parameters():
            if parameter.ndim == 5:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
            elif parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


class Encoder(nn.Module):
    """Frames (b, 3, f, H, W), f = 1 for a clip's first and 4 for all others, to one latent frame of 2 z channels."""

    def __init__(self, widths: Sequence[int], z_dim: int, num_res_blocks: int, halves_time: Sequence[bool]) -> None:
        super().__init__()
        slots = count()
        self.conv_in = CausalConv(3, widths[0], slots)
        layers: list[nn.Module] = []
        for level, (width, width_out) in enumerate(pairwise([widths[0], *widths])):
            layers += [ResidualBlock(width if i == 0 else width_out, width_out, slots) for i in range(num_res_blocks)]
            if level < len(halves_time):
                layers.append(Downsampler(width_out, halves_time[level], slots))
        self.down_blocks = nn.ModuleList(layers)
        self.mid_block = MiddleBlock(widths[-1], slots)
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv(widths[-1], 2 * z_dim, slots)
        self.num_slots = num_convolutions(self)

    def forward(self, frames: Tensor, slots: Slots) -> Tensor:
        x = self.conv_in(frames, slots)
        for layer in self.down_blocks:
            x = layer(x, slots)
        output: Tensor = self.conv_out(activated(self.norm_out, self.mid_block(x, slots)), slots)
        return output


class Decoder(nn.Module):
    """One latent frame (b, z, 1, h, w) to frames (b, 3, f, 8 h, 8 w), f = 1 for a stream's first and 4 for others."""

    def __init__(self, widths: Sequence[int], z_dim: int, num_res_blocks: int, doubles_time: Sequence[bool]) -> None:
        super().__init__()
        slots = count()
        self.conv_in = CausalConv(z_dim, widths[0], slots)
        self.mid_block = MiddleBlock(widths[0], slots)
        self.up_blocks = nn.ModuleList()
        width = widths[0]
        for level, width_out in enumerate(widths):
            doubles = doubles_time[level] if level < len(doubles_time) else None
            self.up_blocks.append(UpBlock(width, width_out, num_res_blocks + 1, doubles, slots))
            width = width_out // 2
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv(widths[-1], 3, slots)
        self.num_slots = num_convolutions(self)

    def forward(self, latent: Tensor, slots: Slots) -> Tensor:
        x = self.mid_block(self.conv_in(latent, slots), slots)
        for block in self.up_blocks:
            x = block(x, slots)
        output: Tensor = self.conv_out(activated(self.norm_out, x), slots)
        return output


class CausalConv(nn.Conv3d):
    """A convolution that is causal in time, with zeros before a stream's first frame and around every frame."""

    def __init__(self, width: int, width_out: int, slots: Iterator[int], kernel: Sequence[int] = (3, 3, 3)) -> None:
        """slots: the next one is this convolution's."""
        super().__init__(width, width_out, tuple(kernel), padding=(0, kernel[1] // 2, kernel[2] // 2))  # type: ignore[arg-type]
        self.slot = next(slots)

    def forward(self, frames: Tensor, slots: Slots) -> Tensor:  # type: ignore[override]
        """Return as many frames as there are in `frames` (b, c, t, h, w)."""
        past = slots[self.slot]
        if past is None:
            past = no_frames(frames)
        joined = torch.cat([past, frames], dim=2)
        # A copy: a view would keep all frames of the call alive.
        slots[self.slot] = joined[:, :, -PAST_FRAMES:].clone()
        return super().forward(joined)


class ChannelNorm(nn.Module):
    """A root mean square normalisation over channels.

    num_axes: axes behind the channels in the stored weights.
    """

    def __init__(self, width: int, num_axes: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width, *[1] * num_axes))

    def forward(self, x: Tensor) -> Tensor:
        """x, result: (b, c, t, h, w)."""
        # Not `rms_norm`: its one kernel spends a block of threads on each pixel, which is too much for 96 channels.
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min_(SHORTEST)
        return x.div(length).mul_(rearrange(self.gamma.flatten() * x.shape[1] ** 0.5, "c -> c 1 1 1"))


class ResidualBlock(nn.Module):
    """Two convolutions in time, and a shortcut of one pixel where the width changes."""

    def __init__(self, width: int, width_out: int, slots: Iterator[int]) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(width)
        self.conv1 = CausalConv(width, width_out, slots)
        self.norm2 = ChannelNorm(width_out)
        self.conv2 = CausalConv(width_out, width_out, slots)
        self.conv_shortcut = nn.Identity() if width == width_out else nn.Conv3d(width, width_out, 1)

    def forward(self, x: Tensor, slots: Slots) -> Tensor:
        change = self.conv1(activated(self.norm1, x), slots)
        change = self.conv2(activated(self.norm2, change), slots)
        output: Tensor = change.add_(self.conv_shortcut(x))
        return output


class PixelAttention(nn.Module):
    """Self-attention of one head among the pixels of each frame."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(width, num_axes=2)
        self.to_qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, _, height, _ = x.shape
        tokens = rearrange(self.norm(x), "b c t h w -> (b t) 1 (h w) c")
        # Convolutions of one pixel are linear maps of channels.
        qkv = functional.linear(tokens, self.to_qkv.weight.flatten(1), self.to_qkv.bias)
        q, k, v = qkv.chunk(3, dim=-1)
        attended = functional.scaled_dot_product_attention(q, k, v)
        change = functional.linear(attended, self.proj.weight.flatten(1), self.proj.bias)
        return rearrange(change, "(b t) 1 (h w) c -> b c t h w", b=batch, h=height) + x


class MiddleBlock(nn.Module):
    """Two residual blocks around attention."""

    def __init__(self, width: int, slots: Iterator[int]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(width, width, slots) for _ in range(2))
        self.attentions = nn.ModuleList([PixelAttention(width)])

    def forward(self, x: Tensor, slots: Slots) -> Tensor:
        first, last = self.resnets
        output: Tensor = last(self.attentions[0](first(x, slots)), slots)
        return output


class UpBlock(nn.Module):
    """Residual blocks of one level, and the upsampler to the next one."""

    def __init__(
        self, width: int, width_out: int, num_res_blocks: int, doubles_time: bool | None, slots: Iterator[int]
    ) -> None:
        """doubles_time: as of `Upsampler`; None for the last level, which has none."""
        super().__init__()
        widths = [width] + [width_out] * num_res_blocks
        self.resnets = nn.ModuleList(ResidualBlock(before, after, slots) for before, after in pairwise(widths))
        self.upsamplers = nn.ModuleList([] if doubles_time is None else [Upsampler(width_out, doubles_time, slots)])

    def forward(self, x: Tensor, slots: Slots) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x, slots)
        return x


class Upsampler(nn.Module):
    """Double height and width, halve the channels and, with `doubles_time`, turn each frame into two."""

    def __init__(self, width: int, doubles_time: bool, slots: Iterator[int]) -> None:
        super().__init__()
        self.time_conv = CausalConv(width, 2 * width, slots, (3, 1, 1)) if doubles_time else None
        enlarge = nn.Upsample(scale_factor=2.0, mode="nearest-exact")
        self.resample = nn.Sequential(enlarge, nn.Conv2d(width, width // 2, 3, padding=1))

    def forward(self, x: Tensor, slots: Slots) -> Tensor:
        if self.time_conv is not None:
            if slots[self.time_conv.slot] is None:
                # A stream's first latent frame stands for one frame, and the next one does not see it.
                slots[self.time_conv.slot] = no_frames(x)
            else:
                pairs = rearrange(self.time_conv(x, slots), "b (p c) t h w -> b t p h w c", p=2)
                x = rearrange(pairs, "b t p h w c -> b (t p) h w c").movedim(-1, 1)
        return in_space(self.resample, x)


class Downsampler(nn.Module):
    """Halve height and width and, with `halves_time`, join two frames into one."""

    def __init__(self, width: int, halves_time: bool, slots: Iterator[int]) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(width, width, 3, stride=2))
        self.time_conv = nn.Conv3d(width, width, (3, 1, 1), stride=(2, 1, 1)) if halves_time else None
        self.slot = next(slots) if halves_time else None

    def forward(self, x: Tensor, slots: Slots) -> Tensor:
        x = in_space(self.resample, x)
        if self.time_conv is None or self.slot is None:
            return x
        past = slots[self.slot]
        slots[self.slot] = x[:, :, -1:].clone()
        if past is not None:
            x = self.time_conv(torch.cat([past, x], dim=2))
        return x


def activated(norm: ChannelNorm, x: Tensor) -> Tensor:
    """Return SiLU of the normalised x, in the normalisation's own memory."""
    return functional.silu(norm(x), inplace=True)


def in_space(layer: nn.Module, x: Tensor) -> Tensor:
    """Return a layer's result for each frame of x (b, c, t, h, w)."""
    pictures: Tensor = layer(rearrange(x, "b c t h w -> (b t) c h w"))
    return rearrange(pictures, "(b t) c h w -> b c t h w", b=len(x))


def no_frames(like: Tensor) -> Tensor:
    """Return the past of a stream without one: PAST_FRAMES frames of zeros, in the shape and order of `like`."""
    batch, channels, _, height, width = like.shape
    return like.new_zeros(batch, PAST_FRAMES, height, width, channels).movedim(-1, 1)


def num_convolutions(module: nn.Module) -> int:
    """Return the slots of an encoder or a decoder, a shortcut's unused one included, as diffusers counts them."""
    return sum(isinstance(each, nn.Conv3d) for each in module.modules())
