"""What an encoder of sound is: one window in, the hidden states of one block out."""

from pathlib import Path
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from avatar.audio.statistics import Statistics
from avatar.checkpoints.part import Part

Config = TypeVar("Config")


class Encoder(Protocol):
    """A network that makes features from sound, and the window of sound that it needs for a block.

    left_samples: samples of the window before the block's first.
    right_frames: encoder frames of the window behind the block's last, if the session does not say.
    right_is_free: whether sessions may say; else it is part of what the network was trained with.
    num_states, width: l and d of the features.
    """

    left_samples: int
    right_frames: int
    right_is_free: bool
    num_states: int
    width: int

    @classmethod
    def load(cls, part: Part, *, dtype: torch.dtype, device: torch.device | str) -> Self:
        """The encoder of a checkpoint's part, its network in dtype. ValueError if config or weights do not fit."""
        ...

    @classmethod
    def tiny(cls) -> Self:
        """A small one with random weights, for tests."""
        ...

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write a folder that `load` reads as a part."""
        ...

    def encode(self, window: Tensor, statistics: Statistics, right_frames: int) -> tuple[Tensor, Statistics]:
        """All hidden states around one block, and the statistics with what encoding found.

        window: (s,) sound at 16 kHz from left_samples before the block, or from the stream's start if that is later,
            to right_frames behind it.
        statistics: of all the stream's sound up to the window's end.
        right_frames: how far this window goes, the encoder's own number unless that is free.
        Returns (l, t, d) float32 whose last frame is the block's last one, 24 k + 23, and which goes back to frame
        24 k - 1 or the stream's first.
        """
        ...


def configured(config: type[Config], part: Part) -> Config:
    """The encoder's configuration. ValueError if the part's has fields missing, surplus or wrong."""
    try:
        return config(**part.config)
    except TypeError as error:
        raise ValueError(f"the configuration in {part.folder} is no {config.__name__}: {error}") from error
