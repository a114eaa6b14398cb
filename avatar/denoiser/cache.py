"""Keys and values that a block attends to: its history.

Layers hand a history their new keys and values and get back all that may be read, the new ones among them. Serving
keeps a ring per layer (`KVCache`); training puts a whole clip through the network at once (`ClipHistory`).

A cache has two regions in one buffer. The sink holds the condition tokens (reference, then motion) and is never
evicted; the window holds the most recent blocks and forgets the oldest first.

Axes: b batch, n tokens, h heads, d head width.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from einops import repeat
from torch import Tensor

from avatar.denoiser.attention import (
    REFERENCE_FRAME,
    Visible,
    block_positions,
    condition_positions,
    grid_size,
    num_time_channels,
    rotate,
    rotation,
)
from avatar.denoiser.config import NetworkConfig

# Keys and values (b, n, h, d) of one layer.
KeysValues = tuple[Tensor, Tensor]


class History(Protocol):
    """What a block's layers see besides the block."""

    @property
    def visible(self) -> Visible | None:
        """Which keys each share of the queries sees; None: all of them."""

    def extend(self, layer: int, k: Tensor, v: Tensor) -> KeysValues:
        """Add a layer's new keys, rotated, and values; returns all keys and values to be read."""


class KVCache:
    """One level's history of one session (or of b sessions that step together): a sink and a ring of blocks.

    Per block: `begin`, then `extend` once per layer. Keys lie in the buffer as they are read, rotated. Of the sink
    only the reference moves, and only its frame changes, so the unrotated keys are kept for those of its channels
    that turn with the frame.
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
        self._time_channels = num_time_channels(config.head_dim)

        def buffers(tokens: int, channels: int) -> list[Tensor]:
            shape = (batch, tokens, config.num_heads, channels)
            return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]

        capacity = self._sink_tokens + self._window_blocks * self._block_tokens
        self._keys = buffers(capacity, config.head_dim)
        self._values = buffers(capacity, config.head_dim)
        self._moving = buffers(self._reference_tokens, self._time_channels)
        self._reference_frame = REFERENCE_FRAME
        self._first_block: int | None = None
        self._filled = 0
        self._slot = 0

    def set_sink(self, conditions: Sequence[KeysValues]) -> None:
        """Replace the sink by prefill's keys, not rotated, and values of every layer; the window stays as it is."""
        turns = rotation(self._positions, self._head_dim)
        for layer, (k, v) in enumerate(conditions):
            self._keys[layer][:, : self._sink_tokens] = rotate(k, turns)
            self._values[layer][:, : self._sink_tokens] = v
            self._moving[layer].copy_(k[:, : self._reference_tokens, :, : self._time_channels])
        self._reference_frame = REFERENCE_FRAME

    def begin(self, index: int, reference_frame: int) -> None:
        """Make room for block `index` in the oldest block's place, and stand the reference on its frame."""
        if self._first_block is None:
            self._first_block = index
        self._slot = (index - self._first_block) % self._window_blocks
        assert self._slot <= self._filled, "blocks come in order until the window is full"
        self._filled = max(self._filled, self._slot + 1)
        if reference_frame != self._reference_frame:
            self._move_reference(reference_frame)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> KeysValues:
        """Write the block's keys and values (b, n, h, d); returns views of sink and window."""
        keys, values = self._keys[layer], self._values[layer]
        end = self._sink_tokens + self._filled * self._block_tokens
        keys[:, self.current] = k
        values[:, self.current] = v
        return keys[:, :end], values[:, :end]

    @property
    def current(self) -> slice:
        """Where the block that has begun stands among the keys."""
        start = self._sink_tokens + self._slot * self._block_tokens
        return slice(start, start + self._block_tokens)

    def window(self, layer: int) -> KeysValues:
        """The ring of one layer in the order of its slots, unfilled ones zero."""
        return self._keys[layer][:, self._sink_tokens :], self._values[layer][:, self._sink_tokens :]

    @property
    def num_bytes(self) -> int:
        return sum(each.nbytes for each in (*self._keys, *self._values, *self._moving))

    def _move_reference(self, frame: int) -> None:
        position = torch.tensor([[frame, 0, 0]], device=self._positions.device)
        turns = rotation(position, self._head_dim)[:, : self._time_channels // 2]
        for keys, moving in zip(self._keys, self._moving, strict=True):
            keys[:, : self._reference_tokens, :, : self._time_channels] = rotate(moving, turns)
        self._reference_frame = frame


class ClipHistory:
    """The history of every block of a clip at once, for training: gradients flow through all of it.

    Keys are: one copy of the reference per block, standing where that block sees it; motion; the clip itself. A block
    sees its own reference, motion, itself and the blocks of the window before it.
    """

    def __init__(
        self,
        config: NetworkConfig,
        height: int,
        width: int,
        conditions: Sequence[KeysValues],
        reference_frames: Sequence[int | Tensor],
        is_causal: bool = True,
    ) -> None:
        """conditions: prefill's. reference_frames: where each block of the clip sees the reference, or (b,) of them.

        Not causal: one place of the reference for all blocks, and each sees the whole clip.
        """
        device = conditions[0][0].device
        reference = [block_positions(frame, 1, height, width) for frame in reference_frames]
        self._blocks = len(reference)
        self._reference_tokens = reference[0].shape[-2]
        motion = condition_positions(height, width)[self._reference_tokens :]
        positions = torch.cat([*reference, motion.expand(*reference[0].shape[:-2], -1, -1)], dim=-2)
        self._turns = rotation(positions.to(device), config.head_dim)
        self._conditions = conditions
        self.visible = self._visible(config, motion_tokens=len(motion)) if is_causal else None

    def extend(self, layer: int, k: Tensor, v: Tensor) -> KeysValues:
        """All keys and values of a layer, the clip's own k, v (b, n, h, d) last."""
        condition_k, condition_v = map(self._copy_reference, self._conditions[layer])
        return torch.cat([rotate(condition_k, self._turns), k], dim=1), torch.cat([condition_v, v], dim=1)

    def _copy_reference(self, x: Tensor) -> Tensor:
        reference, motion = x[:, : self._reference_tokens], x[:, self._reference_tokens :]
        return torch.cat([repeat(reference, "b n h d -> b (blocks n) h d", blocks=self._blocks), motion], dim=1)

    def _visible(self, config: NetworkConfig, motion_tokens: int) -> list[list[slice]]:
        reference, block = self._reference_tokens, self._reference_tokens * config.num_frames_per_block
        motion = self._blocks * reference
        clip = motion + motion_tokens
        return [
            [
                slice(i * reference, (i + 1) * reference),
                slice(motion, clip),
                slice(clip + max(0, i + 1 - config.window_blocks) * block, clip + (i + 1) * block),
            ]
            for i in range(self._blocks)
        ]
