"""Attention over tokens, and where tokens stand.

A token's position (frame, row, column) is rotated into its query and key; a frame may be negative (motion before the
stream) and grows without bound, so angles are computed, never looked up in a table.

Axes: b batch, t latent frames, n tokens, h heads, d width (of all heads, or of one where h stands beside it),
m complex channels (pairs of neighbouring real ones), h w of latents where sizes are meant.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from avatar.denoiser.config import PATCH

THETA = 10000.0
# The frame on which prefill places the reference, and on which it stays until a block comes near.
REFERENCE_FRAME = 30
# Frames and rows/columns (in latents) of each group of motion tokens, newest group first, and the frame of its tokens.
MOTION_GROUPS = (((1, 2), (-1,)), ((2, 4), (-3,)), ((4, 8), (-19, -14, -9, -4)))


# For each equal share of a pass's queries, in order, the spans of keys that it sees.
Visible: TypeAlias = Sequence[Sequence[slice]]


def widen(x: Tensor) -> Tensor:
    """x in float32 at least: what norms, rotations and time are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """Root-mean-square norm over the whole width with a learned weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(widen(x), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


class Attention(nn.Module):
    """Projections to queries, keys and values, and softmax attention between them.

    Queries and keys are normalised over the whole width before they are split into heads. Self-attention, text and
    audio differ only in where keys and values come from.
    """

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)
        self.num_heads = num_heads

    def queries(self, x: Tensor) -> Tensor:
        """(b, n, d) -> (b, n, h, d)."""
        q: Tensor = self.norm_q(self.q(x))
        return rearrange(q, "b n (h d) -> b n h d", h=self.num_heads)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(b, n, d) -> keys and values (b, n, h, d)."""
        k, v = self.norm_k(self.k(x)), self.v(x)
        return (
            rearrange(k, "b n (h d) -> b n h d", h=self.num_heads),
            rearrange(v, "b n (h d) -> b n h d", h=self.num_heads),
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible | None = None) -> Tensor:
        """(b, n, d): what each query reads of the keys that it sees. q, k, v: (b, n, h, d)."""
        if visible is None:
            return self.project(attend(q, k, v))
        shares = q.chunk(len(visible), dim=1)
        read = [attend(share, *seen(spans, k, v)) for share, spans in zip(shares, visible, strict=True)]
        return self.project(torch.cat(read, dim=1))

    def project(self, read: Tensor) -> Tensor:
        """Values that were read, (b, n, h, d), back to the hidden width: (b, n, d)."""
        projected: Tensor = self.o(rearrange(read, "b n h d -> b n (h d)"))
        return projected


def seen(spans: Sequence[slice], *tokens: Tensor) -> list[Tensor]:
    """The tokens (b, n, h, d) of the spans, one after the other."""
    return [torch.cat([each[:, span] for span in spans], dim=1) for each in tokens]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of all queries to all keys, each (b, n, h, d)."""
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    if q.requires_grad and q.device.type == "cpu":
        # The backward pass of the CPU's fused attention takes twice as long as that of the softmax spelt out.
        read: Tensor = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v
    else:
        read = functional.scaled_dot_product_attention(q, k, v)
    return read.transpose(1, 2)


def axis_frequencies(head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse frequencies of time, height and width, float64, (m,) each: a third of the channels per spatial axis."""
    spatial = head_dim // 2 // 3
    sizes = (head_dim // 2 - 2 * spatial, spatial, spatial)
    time, height, width = (
        torch.tensor([THETA ** (-channel / m) for channel in range(m)], dtype=torch.float64) for m in sizes
    )
    return time, height, width


def num_time_channels(head_dim: int) -> int:
    """Real channels of a head, from the first, that turn with the frame alone."""
    return 2 * len(axis_frequencies(head_dim)[0])


def rotation(positions: Tensor, head_dim: int) -> Tensor:
    """(..., n, m) complex64: the turn of each channel at positions (..., n, 3) of (frame, row, column).

    Cosine and sine are float64 rounded through float32 to float16, as the reference stores its tables.
    """
    frequencies = (each.to(positions.device) for each in axis_frequencies(head_dim))
    angles = torch.cat([positions[..., axis, None] * each for axis, each in enumerate(frequencies)], dim=-1)
    return torch.complex(*(part.float().half().float() for part in (angles.cos(), angles.sin())))


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """x (b, n, h, d) with each pair of neighbouring channels turned; turns: (n, m) or (b, n, m) of `rotation`."""
    pairs = torch.view_as_complex(rearrange(widen(x), "b n h (m pair) -> b n h m pair", pair=2))
    return rearrange(torch.view_as_real(pairs * turns.unsqueeze(-2)), "b n h m pair -> b n h (m pair)").to(x.dtype)


def grid_size(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of tokens on a frame of height x width latents."""
    return height // PATCH, width // PATCH


def block_positions(first_frame: int | Tensor, num_frames: int, height: int, width: int) -> Tensor:
    """(n, 3) or, for first_frame (b,), (b, n, 3): tokens of num_frames frames, ordered (frame, row, column)."""
    rows, columns = grid_size(height, width)
    grid = torch.cartesian_prod(torch.arange(num_frames), torch.arange(rows), torch.arange(columns))
    start = torch.as_tensor(first_frame)
    offset = torch.stack([start, torch.zeros_like(start), torch.zeros_like(start)], dim=-1)
    return grid.to(offset.device) + offset.unsqueeze(-2)


def condition_positions(height: int, width: int) -> Tensor:
    """(n, 3): reference tokens on REFERENCE_FRAME, then motion tokens, newest group first.

    Motion groups are coarser than the grid and spread over all of it.
    """
    rows, columns = grid_size(height, width)
    groups = [block_positions(REFERENCE_FRAME, 1, height, width)]
    for (_, size), frames in MOTION_GROUPS:
        spread = (np.linspace(0, end - 1, length // size) for end, length in ((rows, height), (columns, width)))
        groups.append(torch.cartesian_prod(torch.tensor(frames), *(torch.from_numpy(s.astype(int)) for s in spread)))
    return torch.cat(groups)


def reference_frame(first_frame: int, distance: int) -> int:
    """Where the reference stands for a block: on its own frame at first, later `distance` ahead of the block."""
    return max(REFERENCE_FRAME, first_frame + distance)
