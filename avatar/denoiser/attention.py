"""Attention, rotary position embedding (RoPE), and the positions of tokens.

RoPE rotates a token's position (frame, row, column) into its query and key. A frame may be negative (motion before the
stream) and grows without bound, so a rope table is computed for the positions at hand, never stored for all.

Source: RoPE (arXiv 2104.09864), in the three-axis form of Wan2.2-S2V.
Axes: b batch, t latent frames, n tokens, h heads, d width (of all heads; of one head in (b, n, h, d)), m pairs of
neighbouring channels of a head. height, width: of latents.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from avatar.denoiser.config import PATCH

CPU = torch.device("cpu")
THETA = 10000.0
# The reference's frame in prefill; it stays there until blocks come near (`reference_frame`).
REFERENCE_FRAME = 30
# Groups of motion tokens, newest first: a token's size (latent frames, rows and columns), and the tokens' frames.
MOTION_GROUPS = (((1, 2), (-1,)), ((2, 4), (-3,)), ((4, 8), (-19, -14, -9, -4)))


# An attention mask: for each of equal shares of the queries, in order, the spans of keys that it attends to.
Visible: TypeAlias = Sequence[Sequence[slice]]


def upcast(x: Tensor) -> Tensor:
    """Cast x to float32 at least: the dtype of norms, RoPE and timestep embeddings."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def multiply_add(x: Tensor, y: Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x * y + z, computed in the widest of their dtypes and rounded once, to dtype; their shapes broadcast.

    Without gradients it is one kernel on a GPU, which reads and writes each number once.
    """
    widest = torch.promote_types(torch.promote_types(x.dtype, y.dtype), z.dtype)
    # torch has no gradient of results that are written to a given tensor.
    if widest == dtype or torch.is_grad_enabled():
        return torch.addcmul(z, x, y).to(dtype)
    shape = torch.broadcast_tensors(x, y, z)[0].shape  # type: ignore[no-untyped-call]
    return torch.addcmul(z, x, y, out=torch.empty(shape, dtype=dtype, device=x.device))


class RMSNorm(nn.Module):
    """Root-mean-square norm over the whole width, with a learned weight; half precision is rounded once, at the end.

    Source: arXiv 1910.07467.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # Under autocast the weights have another dtype than x; else `to` has no effect.
        return functional.rms_norm(x.to(self.weight.dtype), x.shape[-1:], self.weight, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention: projections, QK norm and scaled dot-product attention.

    Queries and keys are normalised over the whole width before they are split into heads. Self-attention and the
    cross-attention to text and audio differ only in the source of keys and values.
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
        """Project x (b, n, d) to normalised queries (b, n, h, d)."""
        q: Tensor = self.norm_q(self.q(x))
        return rearrange(q, "b n (h d) -> b n h d", h=self.num_heads)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Project x (b, n, d) to normalised keys, and values, (b, n, h, d) each."""
        k, v = self.norm_k(self.k(x)), self.v(x)
        return (
            rearrange(k, "b n (h d) -> b n h d", h=self.num_heads),
            rearrange(v, "b n (h d) -> b n h d", h=self.num_heads),
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible | None = None) -> Tensor:
        """Attend from q to k and v, (b, n, h, d) each, under the mask `visible`; returns the output (b, n, d)."""
        if visible is None:
            return self.project(attend(q, k, v))
        shares = zip(q.chunk(len(visible), dim=1), select(visible, k), select(visible, v), strict=True)
        attended = [attend(*share) for share in shares]
        return self.project(torch.cat(attended, dim=1))

    def project(self, attended: Tensor) -> Tensor:
        """Project attended values (b, n, h, d) back to the hidden width: (b, n, d)."""
        projected: Tensor = self.o(rearrange(attended, "b n h d -> b n (h d)"))
        return projected


def select(visible: Visible, tokens: Tensor) -> list[Tensor]:
    """Concatenate the spans of tokens (b, n, h, d) that each share of the queries sees.

    The tokens are split once: the gradient of every slice would be as large as all tokens.
    """
    ends = {edge for spans in visible for span in spans for edge in (span.start, span.stop)}
    edges = sorted({0, tokens.shape[1], *ends})
    pieces = torch.split(tokens, [stop - start for start, stop in pairwise(edges)], dim=1)
    numbers = {edge: number for number, edge in enumerate(edges)}
    return [
        torch.cat([piece for span in spans for piece in pieces[numbers[span.start] : numbers[span.stop]]], dim=1)
        for spans in visible
    ]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of all queries to all keys; q, k, v, result: (b, n, h, d)."""
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    if q.requires_grad and q.device.type == "cpu":
        # The CPU's fused attention takes twice as long in the backward pass as an explicit softmax.
        attended: Tensor = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v
    else:
        attended = functional.scaled_dot_product_attention(q, k, v)
    return attended.transpose(1, 2)


@lru_cache(maxsize=16)
def axis_frequencies(head_dim: int, device: torch.device = CPU) -> tuple[Tensor, Tensor, Tensor]:
    """Return RoPE's frequencies of time, height and width, float64 (m,) each; a spatial axis has a third of m.

    They stay on the device, so that a step copies none. Do not change them in place.
    """
    spatial = head_dim // 2 // 3
    sizes = (head_dim // 2 - 2 * spatial, spatial, spatial)
    time, height, width = (
        torch.tensor([THETA ** (-channel / m) for channel in range(m)], dtype=torch.float64, device=device)
        for m in sizes
    )
    return time, height, width


def rope_table(positions: Tensor, head_dim: int) -> Tensor:
    """Return RoPE's factors at positions (..., n, 3) of (frame, row, column): (2, ..., n, d) float32.

    They are the cosine of each channel's angle, and its sine with the sign that `apply_rope` needs.
    Cosine and sine are float64 rounded through float32 to float16, as in the reference's tables.
    """
    frequencies = axis_frequencies(head_dim, positions.device)
    angles = torch.cat([positions[..., axis, None] * each for axis, each in enumerate(frequencies)], dim=-1)
    cosine, sine = (part.float().half().float() for part in (angles.cos(), angles.sin()))
    pairs = torch.stack([torch.stack([cosine, cosine], dim=-1), torch.stack([-sine, sine], dim=-1)])
    return pairs.flatten(-2)


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate each pair of neighbouring channels of x (b, n, h, d) by a rope table (2, n, d) or (2, b, n, d)."""
    cosine, sine = table.unsqueeze(-2).unbind()
    swapped = torch.stack([x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return multiply_add(swapped, sine, x * cosine, x.dtype)


def grid_size(height: int, width: int) -> tuple[int, int]:
    """Return rows and columns of tokens of a frame of height x width latents."""
    return height // PATCH, width // PATCH


@lru_cache(maxsize=64)
def grid_positions(num_frames: int, height: int, width: int, device: torch.device) -> Tensor:
    """Return the positions of a block at frame 0, as `block_positions`; kept like `axis_frequencies`."""
    rows, columns = grid_size(height, width)
    return torch.cartesian_prod(*(torch.arange(each, device=device) for each in (num_frames, rows, columns)))


def block_positions(
    first_frame: int | Tensor, num_frames: int, height: int, width: int, device: torch.device = CPU
) -> Tensor:
    """Return the positions of num_frames frames' tokens, ordered by frame, row, column: (n, 3).

    first_frame: of the first; a tensor (b,) gives (b, n, 3), on its own device.
    """
    if isinstance(first_frame, Tensor):
        grid = grid_positions(num_frames, height, width, first_frame.device).repeat(*first_frame.shape, 1, 1)
        grid[..., 0] += first_frame.unsqueeze(-1)
    else:
        grid = grid_positions(num_frames, height, width, device).clone()
        grid[:, 0] += first_frame
    return grid


def condition_positions(height: int, width: int) -> Tensor:
    """Return the positions (n, 3) of the condition tokens: reference, then motion, newest group first.

    The reference is on REFERENCE_FRAME. Motion groups have fewer tokens than the grid, spread over all of it.
    """
    rows, columns = grid_size(height, width)
    groups = [block_positions(REFERENCE_FRAME, 1, height, width)]
    for (_, size), frames in MOTION_GROUPS:
        spread = (np.linspace(0, end - 1, length // size) for end, length in ((rows, height), (columns, width)))
        groups.append(torch.cartesian_prod(torch.tensor(frames), *(torch.from_numpy(s.astype(int)) for s in spread)))
    return torch.cat(groups)


def reference_frame(first_frame: int, distance: int) -> int:
    """Return the reference's frame for a block: REFERENCE_FRAME at first, later `distance` ahead of the block.

    Source: the rolling sink frame of arXiv 2512.04677, which keeps the relative positions of training.
    """
    return max(REFERENCE_FRAME, first_frame + distance)
