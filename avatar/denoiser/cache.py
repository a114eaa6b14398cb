"""KV caches: the keys and values that a block attends to.

A layer passes its new keys and values to a history and gets back all that the block attends to, the new ones included.
Serving keeps a ring buffer per layer (`KVCache`); training runs a whole clip at once (`training.clips.ClipHistory`).

The cache of a layer has two regions in one buffer. The sink holds the condition tokens (reference, then motion) and is
never evicted; the window holds the most recent blocks and evicts the oldest first.

Source: causal attention with a KV cache as in CausVid (arXiv 2412.07772) and Self-Forcing (arXiv 2506.08009); the sink
frame is arXiv 2512.04677's.

Axes: b batch, n tokens, h heads, d head width.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from avatar.denoiser.attention import (
    REFERENCE_FRAME,
    Visible,
    apply_rope,
    axis_frequencies,
    condition_positions,
    grid_size,
    rope_table,
)
from avatar.denoiser.config import NetworkConfig

# Keys and values (b, n, h, d) of one layer.
KeysValues = tuple[Tensor, Tensor]


class History(Protocol):
    """The keys and values that layers attend to, extended by each layer's own."""

    @property
    def visible(self) -> Visible | None:
        """The attention mask; None: all queries attend to all keys."""

    def extend(self, layer: int, k: Tensor, v: Tensor) -> KeysValues:
        """Add a layer's new keys (with RoPE) and values (b, n, h, d); return all keys and values to attend to."""


class KVCache:
    """The history of one session at one level: a sink and a ring of blocks (b > 1 in training).

    Per block: `start_block`, then `extend` once per layer. Keys are stored with RoPE applied. In the sink only the
    reference's position changes, and only its frame, so keys without RoPE are kept too, of the reference's tokens and
    the channels that depend on the frame.
    """

    visible = None

    def __init__(
        self,
        config: NetworkConfig,
        height: int,
        width: int,
        *,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """height, width: of the latents."""
        rows, columns = grid_size(height, width)
        self._positions = condition_positions(height, width).to(device)
        self._reference_tokens = rows * columns
        self._sink_tokens = len(self._positions)
        self._block_tokens = rows * columns * config.num_frames_per_block
        self._window_blocks = config.window_blocks
        self._head_dim = config.head_dim
        # The first real channels of a head, which RoPE rotates by the frame.
        self._time_channels = 2 * len(axis_frequencies(config.head_dim)[0])

        def buffers(tokens: int, channels: int) -> list[Tensor]:
            shape = (batch, tokens, config.num_heads, channels)
            return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]

        capacity = self._sink_tokens + self._window_blocks * self._block_tokens
        self._keys = buffers(capacity, config.head_dim)
        self._values = buffers(capacity, config.head_dim)
        self._unrotated = buffers(self._reference_tokens, self._time_channels)
        self._reference_frame = REFERENCE_FRAME
        self._first_block: int | None = None
        self._filled = 0
        self._slot = 0

    def set_sink(self, conditions: Sequence[KeysValues]) -> None:
        """Replace the sink by prefill's keys (without RoPE) and values of every layer; keep the window."""
        table = rope_table(self._positions, self._head_dim)
        for layer, (k, v) in enumerate(conditions):
            self._keys[layer][:, : self._sink_tokens] = apply_rope(k, table)
            self._values[layer][:, : self._sink_tokens] = v
            self._unrotated[layer].copy_(k[:, : self._reference_tokens, :, : self._time_channels])
        self._reference_frame = REFERENCE_FRAME

    def start_block(self, index: int, reference_frame: int) -> None:
        """Assign the oldest block's slot to block `index`, and move the reference to its frame."""
        if self._first_block is None:
            self._first_block = index
        self._slot = (index - self._first_block) % self._window_blocks
        assert self._slot <= self._filled, "blocks come in order until the window is full"
        self._filled = max(self._filled, self._slot + 1)
        if reference_frame != self._reference_frame:
            self._move_reference(reference_frame)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> KeysValues:
        """Write the block's keys and values (b, n, h, d) into its slot; return views of sink and window."""
        keys, values = self._keys[layer], self._values[layer]
        end = self._sink_tokens + self._filled * self._block_tokens
        keys[:, self.current] = k
        values[:, self.current] = v
        return keys[:, :end], values[:, :end]

    @property
    def current(self) -> slice:
        """The current block's slot among the keys."""
        start = self._sink_tokens + self._slot * self._block_tokens
        return slice(start, start + self._block_tokens)

    def window(self, layer: int) -> KeysValues:
        """Return keys and values of one layer's ring in the order of its slots, unfilled ones zero."""
        return self._keys[layer][:, self._sink_tokens :], self._values[layer][:, self._sink_tokens :]

    @property
    def num_bytes(self) -> int:
        return sum(each.nbytes for each in (*self._keys, *self._values, *self._unrotated))

    def _move_reference(self, frame: int) -> None:
        position = torch.tensor([[frame, 0, 0]], device=self._positions.device)
        table = rope_table(position, self._head_dim)[:, : self._time_channels // 2]
        for keys, unrotated in zip(self._keys, self._unrotated, strict=True):
            keys[:, : self._reference_tokens, :, : self._time_channels] = apply_rope(unrotated, table)
        self._reference_frame = frame
