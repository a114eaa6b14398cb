"""The network's parts: embeddings of latents and timesteps, the transformer layer, the head.

The hidden state is (b, t, s, d) throughout; AdaLN modulation has one row per latent frame, or one for all of them.

Axes: b batch, c channels, t latent frames, h w of latents, s tokens of a latent frame, n tokens, d width.
"""

from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from avatar.denoiser.attention import MOTION_GROUPS, Attention, Visible, apply_rope, multiply_add
from avatar.denoiser.audio_injection import UpcastLinear
from avatar.denoiser.config import PATCH, NetworkConfig
from avatar.types import FACE_MOTION, FRAMES_PER_LATENT, MOTION_LATENTS

# Divisors that bring values of face motion to about one: the range of lids, and usual deviations of angles.
FACE_MOTION_SCALES = (1.0, 0.1, 0.15, 0.05, 0.15, 0.1)


class PatchEmbedding(nn.Conv3d):
    """A patch embedding: a convolution with stride = kernel, computed as one matrix product."""

    def __init__(self, in_dim: int, dim: int, frames: int, size: int) -> None:
        super().__init__(in_dim, dim, (frames, size, size), (frames, size, size))

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, t, h, w) -> (b, t, s, d); trailing frames, rows and columns that fill no patch are dropped."""
        p, q, r = self.kernel_size
        _, _, t, h, w = x.shape
        x = x[:, :, : t // p * p, : h // q * q, : w // r * r]
        patches = rearrange(x, "b c (t p) (h q) (w r) -> b t (h w) (c p q r)", p=p, q=q, r=r)
        return functional.linear(patches, self.weight.flatten(1), self.bias)


class FramePacker(nn.Module):
    """Motion frames to tokens; older frames get coarser patches.

    Source: FramePack (arXiv 2504.12626), with the bucket sizes of Wan2.2-S2V.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.proj, self.proj_2x, self.proj_4x = (
            PatchEmbedding(config.in_dim, config.dim, frames, size) for (frames, size), _ in MOTION_GROUPS
        )

    def forward(self, motion: Tensor) -> Tensor:
        """(b, c, t, h, w), oldest frame first -> (b, n, d), newest group first; missing frames are zeros."""
        missing = MOTION_LATENTS - motion.shape[2]
        recent = functional.pad(motion, (0, 0, 0, 0, missing, 0)) if missing > 0 else motion[:, :, -MOTION_LATENTS:]
        groups = zip((self.proj_4x, self.proj_2x, self.proj), torch.split(recent, [16, 2, 1], dim=2), strict=True)
        tokens = [rearrange(project(frames), "b t s d -> b (t s) d") for project, frames in groups]
        return torch.cat(tokens[::-1], dim=1)


@lru_cache(maxsize=16)
def face_motion_scales(device: torch.device) -> Tensor:
    """Return FACE_MOTION_SCALES (m, 1) on a device, where they stay."""
    return torch.tensor(FACE_MOTION_SCALES, device=device)[:, None]


class FaceMotionEmbedding(nn.Module):
    """Values of face motion to a residual of the hidden state, the same at all tokens of a latent frame."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.first = UpcastLinear(FRAMES_PER_LATENT * len(FACE_MOTION), config.dim)
        self.last = UpcastLinear(config.dim, config.dim)

    def forward(self, values: Tensor) -> Tensor:
        """(b, m, f) -> (b, t, 1, d)."""
        columns = rearrange(values / face_motion_scales(values.device), "b m (t p) -> b t 1 (m p)", p=FRAMES_PER_LATENT)
        embedded: Tensor = self.last(functional.silu(self.first(columns)))
        return embedded


def timestep_embedding(timesteps: Tensor, width: int) -> Tensor:
    """Return the sinusoidal embedding of timesteps (...) in [0, 1000]: cosines, then sines, (..., width) float32.

    Computed in float64. Source: DDPM's timestep embedding, as in Wan2.2.
    """
    half = width // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=timesteps.device) / half)
    angles = timesteps.double().unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


class Layer(nn.Module):
    """A transformer layer with AdaLN: self-attention, cross-attention to text, feed-forward network.

    `project` and `forward` are two halves; between them the network extends the KV cache. With half-precision weights
    the residual stream is float32 from the first sum to the end of the layer.
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

    def project(self, x: Tensor, modulation: Tensor, rope_table: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries and keys, with RoPE if there is a table, and values (b, n, h, d) of x (b, t, s, d).

        modulation: as in `forward`.
        """
        shift, scale = modulation[:2].unbind()
        normed = multiply_add(self.norm(x), scale, shift, x.dtype)
        tokens = rearrange(normed, "b t s d -> b (t s) d")
        q, (k, v) = self.self_attn.queries(tokens), self.self_attn.keys_values(tokens)
        if rope_table is None:
            return q, k, v
        return apply_rope(q, rope_table), apply_rope(k, rope_table), v

    def forward(
        self,
        x: Tensor,
        attended: tuple[Tensor, Tensor, Tensor],
        text: tuple[Tensor, Tensor],
        modulation: Tensor,
        visible: Visible | None = None,
    ) -> Tensor:
        """Return x (b, t, s, d) after the layer.

        attended: queries of x, and the keys to attend to, with RoPE; and their values. visible: attention mask.
        text: keys and values of the text. modulation: (6, b, t or 1, 1, d), shift, 1 + scale and gate of
        self-attention and of the feed-forward network.
        """
        gate1, shift2, scale2, gate2 = modulation[2:].unbind()
        dtype, t = x.dtype, x.shape[1]
        full = torch.promote_types(dtype, gate1.dtype)
        x = multiply_add(rearrange(self.self_attn(*attended, visible), "b (t s) d -> b t s d", t=t), gate1, x, full)
        x = x + self.attend_to_text(x.to(dtype), text)
        fed: Tensor = self.ffn(multiply_add(self.norm(x), scale2, shift2, dtype))
        return multiply_add(fed, gate2, x, dtype)

    def attend_to_text(self, x: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        """Return the residual that text adds to x (b, t, s, d), in a shape that broadcasts."""
        k, v = text
        if k.shape[1] == 1:
            # The softmax over a single key is 1 for every query.
            return rearrange(self.cross_attn.project(v), "b 1 d -> b 1 1 d")
        q = self.cross_attn.queries(rearrange(self.norm3(x), "b t s d -> b (t s) d"))
        attended: Tensor = self.cross_attn(q, k, v)
        return rearrange(attended, "b (t s) d -> b t s d", t=x.shape[1])

    def norm(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], eps=self.eps)


class Head(nn.Module):
    """The output head: hidden state to latent patches."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.head = UpcastLinear(config.dim, config.out_dim * PATCH * PATCH)
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))
        self.eps = config.eps

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x (b, t, s, d), modulation (2, b, t or 1, 1, d) -> (b, t, s, (row column c)): the latents of each patch.

        modulation: shift and 1 + scale.
        """
        shift, scale = modulation.unbind()
        normed = functional.layer_norm(x, x.shape[-1:], eps=self.eps)
        pixels: Tensor = self.head(multiply_add(normed, scale, shift, torch.promote_types(x.dtype, scale.dtype)))
        return pixels


def unpatchify(pixels: Tensor, rows: int) -> Tensor:
    """Arrange the head's patches (b, t, s, (row column c)) to latents (b, c, t, h, w); rows: of tokens."""
    return rearrange(pixels, "b t (h w) (p q c) -> b c t (h p) (w q)", h=rows, p=PATCH, q=PATCH)
