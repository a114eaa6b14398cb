"""The interface of audio encoders: one window of audio in, the hidden states of one block out.

Axes: s samples at 16 kHz, t encoder frames, l encoder layers, d width.
"""

from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor

from avatar.audio.alignment import BlockGrid
from avatar.audio.statistics import AudioStatistics
from avatar.checkpoints.part import Part
from avatar.types import BLOCK_LATENTS


class AudioEncoder(Protocol):
    """A network that computes audio features, and the size of the window that it needs for a block.

    grid: the blocks that it encodes.
    left_samples: samples of the window before the block's first.
    right_frames: encoder frames of the window after the block's last (right context), unless the session sets another
        number.
    right_is_free: sessions may set right_frames; if False, it is part of what the network was trained with.
    num_states, width: l and d of the features.
    """

    grid: BlockGrid
    left_samples: int
    right_frames: int
    right_is_free: bool
    num_states: int
    width: int

    @classmethod
    def load(cls, part: Part, *, dtype: torch.dtype, device: torch.device | str) -> Self:
        """Return the encoder of a checkpoint's part, in dtype. ValueError if config or weights do not fit."""
        ...

    @classmethod
    def tiny(cls, block_latents: int = BLOCK_LATENTS) -> Self:
        """Return a small encoder with random weights, for tests."""
        ...

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write a folder that `load` reads as a part, floating point tensors as dtype if it is given."""
        ...

    def encode(self, window: Tensor, statistics: AudioStatistics, right_frames: int) -> tuple[Tensor, AudioStatistics]:
        """Return the hidden states of one block, and the statistics updated with what the encoder measured.

        window: (s,) audio at 16 kHz from left_samples before the block, or from the stream's start if that is later,
            to right_frames after it.
        statistics: of the stream's audio up to the window's end.
        right_frames: right context of this window; the encoder's own number unless `right_is_free`.
        Returns (l, t, d) float32 whose last frame is the block's last one, and whose first is the one before the block
        or the stream's first.
        """
        ...
