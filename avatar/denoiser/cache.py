"""KV caches: the keys and values that a block attends to.

A layer passes its new keys and values to a history and gets back all that the block attends to, the new ones included.
Serving keeps a ring buffer per layer (`KVCache`); training runs a whole clip at once (`training.clips.ClipHistory`).

The cache of a layer has two regions in one buffer. The sink holds the condition tokens (reference, then motion) and is
never evicted; the window holds the most recent blocks and evicts the oldest first.

What is in the sink is the result of prefill. Condition tokens have timestep 0, so it is the same at every noise level,
and the levels of a process share it (`Prefills`): the first that needs a version computes it, ahead of the version's
first block if it can. Each level then copies the keys and values into its own cache, where attention reads them
together with the level's window.

Source: causal attention with a KV cache as in CausVid (arXiv 2412.07772) and Self-Forcing (arXiv 2506.08009); the sink
frame is arXiv 2512.04677's.

Axes: b batch, n tokens, h heads, d head width.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakSet, WeakValueDictionary

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
from avatar.denoiser.float8 import FLOAT8, Float8Window
from avatar.types import Conditions, Session
from avatar.vae.mover import Texture

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
        window_dtype: torch.dtype | None = None,
    ) -> None:
        """height, width: of the latents. window_dtype: `dtype`, or float8 to halve the window's memory."""
        rows, columns = grid_size(height, width)
        device = torch.device(device)
        self._positions = condition_positions(height, width).to(device)
        self._reference_tokens = rows * columns
        self._sink_tokens = len(self._positions)
        self._block_tokens = rows * columns * config.num_frames_per_block
        self._window_blocks = config.window_blocks
        self._head_dim = config.head_dim
        # The first real channels of a head, which RoPE rotates by the frame.
        self._time_channels = 2 * len(axis_frequencies(config.head_dim, device)[0])

        def buffer(tokens: int, channels: int) -> Tensor:
            shape = (config.num_layers, batch, tokens, config.num_heads, channels)
            return torch.zeros(shape, dtype=dtype, device=device)

        # One buffer of all layers, so that a few kernels move the reference.
        ring = self._window_blocks * self._block_tokens
        self._float8_window = None
        if window_dtype == FLOAT8:
            heads = config.num_heads, config.head_dim
            self._float8_window = Float8Window(
                config.num_layers, batch, self._window_blocks, self._block_tokens, heads, dtype, device
            )
            ring = 0
        capacity = self._sink_tokens + ring
        self._keys = buffer(capacity, config.head_dim)
        self._values = buffer(capacity, config.head_dim)
        self._unrotated = buffer(self._reference_tokens, self._time_channels)
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
        """Write the block's keys and values (b, n, h, d) into its slot; return sink and window.

        They are views, or of a float8 window copies in the dtype of the sink.
        """
        if self._float8_window is not None:
            self._float8_window.write(layer, self._slot, k, v)
            return self._with_float8_window(layer, self._filled)
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
        keys, values = self._keys[layer], self._values[layer]
        if self._float8_window is not None:
            keys, values = self._with_float8_window(layer, self._window_blocks)
        return keys[:, self._sink_tokens :], values[:, self._sink_tokens :]

    @property
    def sink_tokens(self) -> int:
        """Number of condition tokens."""
        return self._sink_tokens

    @property
    def num_bytes(self) -> int:
        window = self._float8_window.num_bytes if self._float8_window else 0
        return window + sum(each.nbytes for each in (self._keys, self._values, self._unrotated))

    def _with_float8_window(self, layer: int, num_blocks: int) -> KeysValues:
        """Return copies of a layer's sink and of the first blocks of its window."""
        assert self._float8_window is not None
        window = num_blocks * self._block_tokens
        batch, sink, *heads = self._keys[layer].shape
        keys, values = (self._keys.new_empty(batch, sink + window, *heads) for _ in range(2))
        keys[:, :sink], values[:, :sink] = self._keys[layer], self._values[layer]
        self._float8_window.read(layer, num_blocks, keys[:, sink:], values[:, sink:])
        return keys, values

    def _move_reference(self, frame: int) -> None:
        position = self._positions[:1].clone()
        position[:, 0] = frame
        table = rope_table(position, self._head_dim)[..., : self._time_channels]
        self._keys[:, :, : self._reference_tokens, :, : self._time_channels] = apply_rope(self._unrotated, table)
        self._reference_frame = frame


@dataclass(eq=False)
class Prefilled:
    """The result of prefill for one version of a session's conditions.

    reference: (1, c, 1, h, w) float32. pose: (1, c, t, h, w) default pose input. texture: of the
    reference, for a network with a mover. text: keys and values per layer.
    sink: keys (without RoPE) and values of the condition tokens per layer; None once every level has them in its cache.
    """

    conditions: Conditions
    reference: Tensor
    pose: Tensor
    texture: Texture | None
    text: list[KeysValues]
    sink: list[KeysValues] | None

    @property
    def version(self) -> int:
        return self.conditions.version

    def is_of(self, conditions: Conditions) -> bool:
        """Return whether these are the conditions that were prefilled.

        Values are compared, too: streams of one session carry equal copies, and a version that no block was made under
        may be replaced by another one of its number.
        """
        ours = self.conditions
        if ours is conditions:
            return True
        return (
            ours.version == conditions.version
            and _equal(ours.sink, conditions.sink)
            and _equal(ours.text, conditions.text)
        )


class Level(Protocol):
    """The state of a session at one level."""

    session: Session
    prefilled: Prefilled | None


class SessionPrefill:
    """The prefills of one session, shared by its levels. One with a sink is kept at a time: it takes gigabytes.

    motion: (c, t, h, w) motion latents of the session.
    """

    def __init__(self, motion: Tensor) -> None:
        self.motion = motion
        self._latest: Prefilled | None = None
        self._levels: WeakSet[Level] = WeakSet()
        self._lock = threading.Lock()

    def add(self, level: Level) -> None:
        """Add a level, for as long as its state lives. May be called from any thread."""
        with self._lock:
            self._levels.add(level)

    def get(self, conditions: Conditions, compute: Callable[[Conditions], Prefilled]) -> Prefilled:
        """Return the prefill of a version with its sink, computed unless it is the latest. On the device's thread."""
        if self._latest is None or self._latest.sink is None or not self._latest.is_of(conditions):
            self._latest = None  # frees its memory before more is needed
            self._latest = compute(conditions)
        return self._latest

    def get_ahead(self, conditions: Conditions, compute: Callable[[Conditions], Prefilled]) -> None:
        """Prefill a version before it is needed, unless a level still needs the sink of the version before."""
        latest = self._latest
        is_needed = latest is not None and latest.sink is not None and not self._have_all(latest.version)
        if is_needed and latest is not None and latest.version != conditions.version:
            return
        if not self._have_all(conditions.version):
            self.get(conditions, compute)

    def release(self) -> None:
        """Drop the latest sink if every level has it in its cache."""
        latest = self._latest
        if latest is not None and latest.sink is not None and self._have_all(latest.version):
            latest.sink = None

    def _have_all(self, version: int) -> bool:
        """Return whether all levels have passed to this version or a later one."""
        with self._lock:
            prefilled = [level.prefilled for level in self._levels]
        return all(each is not None and each.version >= version for each in prefilled)


class Prefills:
    """The prefills of all sessions of a network; each lives as long as one of its session's levels does."""

    def __init__(self) -> None:
        self._sessions: WeakValueDictionary[str, SessionPrefill] = WeakValueDictionary()
        self._lock = threading.Lock()

    def join(self, level: Level) -> SessionPrefill:
        """Return the prefills of a level's session, which count the level from now on. May be called from any thread.

        A session of the same name with other motion latents shares nothing.
        """
        session = level.session
        with self._lock:
            shared = self._sessions.get(session.id)
            if shared is None or not _equal(shared.motion, session.motion):
                shared = self._sessions[session.id] = SessionPrefill(session.motion)
        shared.add(level)
        return shared


def _equal(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.dtype == other.dtype and torch.equal(one, other))
