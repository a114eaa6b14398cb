"""The parts that the network is made of: embeddings of latents, one transformer layer, the head.

The hidden state is (b, t, s, d) throughout; modulation has one row per latent frame, or one for all of them.

Axes: b batch, c channels, t latent frames, h w of latents, s tokens of a latent frame, n tokens, d width.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from avatar.denoiser.attention import MOTION_GROUPS, Attention, Visible
from avatar.denoiser.audio_injection import WideLinear
from avatar.denoiser.config import PATCH, NetworkConfig

# Latent frames of motion that the packer sees.
MOTION_FRAMES = 19


class PatchEmbedding(nn.Conv3d):
    """A convolution whose stride is its kernel, as the product that it is."""

    def __init__(self, in_dim: int, dim: int, frames: int, size: int) -> None:
        super().__init__(in_dim, dim, (frames, size, size), (frames, size, size))

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, t, h, w) -> (b, t, s, d); frames, rows and columns that fill no patch are left out."""
        p, q, r = self.kernel_size
        _, _, t, h, w = x.shape
        x = x[:, :, : t // p * p, : h // q * q, : w // r * r]
        patches = rearrange(x, "b c (t p) (h q) (w r) -> b t (h w) (c p q r)", p=p, q=q, r=r)
        return functional.linear(patches, self.weight.flatten(1), self.bias)


class FramePacker(nn.Module):
    """Motion frames as tokens, the coarser the older.

    Source: FramePack (arXiv 2504.12626), with the bucket sizes of Wan2.2-S2V.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.proj, self.proj_2x, self.proj_4x = (
            PatchEmbedding(config.in_dim, config.dim, frames, size) for (frames, size), _ in MOTION_GROUPS
        )

    def forward(self, motion: Tensor) -> Tensor:
        """(b, c, t, h, w), oldest frame first -> (b, n, d), newest group first. Zeros stand for missing frames."""
        missing = MOTION_FRAMES - motion.shape[2]
        recent = functional.pad(motion, (0, 0, 0, 0, missing, 0)) if missing > 0 else motion[:, :, -MOTION_FRAMES:]
        groups = zip((self.proj_4x, self.proj_2x, self.proj), torch.split(recent, [16, 2, 1], dim=2), strict=True)
        tokens = [rearrange(project(frames), "b t s d -> b (t s) d") for project, frames in groups]
        return torch.cat(tokens[::-1], dim=1)


def sinusoid(timesteps: Tensor, width: int) -> Tensor:
    """(..., width) float32: cosines, then sines, of timesteps (...) in [0, 1000], computed in float64."""
    half = width // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=timesteps.device) / half)
    angles = timesteps.double().unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


def modulate(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normed (b, t, s, d), moved per frame by shift and scale (b, t or 1, 1, d)."""
    return normed * (1 + scale) + shift


class Layer(nn.Module):
    """Self-attention, text and a feed-forward network around the hidden state.

    `project` and `forward` are two halves: between them the network rotates, and a history extends, the keys.
    Half-precision weights keep the residual in float32 from the first sum to the end of the layer.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        dim = config.dim
        self.self_attn = Attention(dim, config.num_heads, config.eps)
        self.cross_attn = Attention(dim, config.num_heads, config.eps)
        self.norm3 = nn.LayerNorm(dim, config.eps)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))
        self.eps = config.eps

    def project(self, x: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (b, n, h, d) of x (b, t, s, d), not rotated."""
        shift, scale = modulation[:2].unbind()
        moved = modulate(self.norm(x), shift, scale).to(x.dtype)
        tokens = rearrange(moved, "b t s d -> b (t s) d")
        return self.self_attn.queries(tokens), *self.self_attn.keys_values(tokens)

    def forward(
        self,
        x: Tensor,
        attended: tuple[Tensor, Tensor, Tensor],
        text: tuple[Tensor, Tensor],
        modulation: Tensor,
        visible: Visible | None = None,
    ) -> Tensor:
        """x (b, t, s, d) after the layer.

        attended: rotated queries of x, and the keys and values that they read, as far as they are visible.
        text: keys and values of the text. modulation: (6, b, t or 1, 1, d).
        """
        gate1, shift2, scale2, gate2 = modulation[2:].unbind()
        dtype, t = x.dtype, x.shape[1]
        x = x + gate1 * rearrange(self.self_attn(*attended, visible), "b (t s) d -> b t s d", t=t)
        x = x + self.read_text(x.to(dtype), text)
        fed: Tensor = self.ffn(modulate(self.norm(x), shift2, scale2).to(dtype))
        return (x + gate2 * fed).to(dtype)

    def read_text(self, x: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        """What text adds to x (b, t, s, d), in a shape that broadcasts."""
        k, v = text
        if k.shape[1] == 1:
            # The softmax over a single key is 1, whatever the query.
            return rearrange(self.cross_attn.project(v), "b 1 d -> b 1 1 d")
        q = self.cross_attn.queries(rearrange(self.norm3(x), "b t s d -> b (t s) d"))
        read: Tensor = self.cross_attn(q, k, v)
        return rearrange(read, "b (t s) d -> b t s d", t=x.shape[1])

    def norm(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], eps=self.eps)


class Head(nn.Module):
    """Hidden state to latents."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.head = WideLinear(config.dim, config.out_dim * PATCH * PATCH)
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))
        self.eps = config.eps

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x (b, t, s, d), modulation (2, b, t or 1, 1, d) -> (b, t, s, (row column c)): the pixels of each patch."""
        shift, scale = modulation.unbind()
        pixels: Tensor = self.head(modulate(functional.layer_norm(x, x.shape[-1:], eps=self.eps), shift, scale))
        return pixels


def unpatch(pixels: Tensor, rows: int) -> Tensor:
    """The head's (b, t, s, (row column c)) as latents (b, c, t, h, w); rows: of tokens."""
    return rearrange(pixels, "b t (h w) (p q c) -> b c t (h p) (w q)", h=rows, p=PATCH, q=PATCH)
