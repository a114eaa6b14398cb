"""What an encoder of sound is: one window in, the hidden states of one block out."""

from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

from avatar.audio.statistics import Statistics
from avatar.checkpoint import read_config

Config = TypeVar("Config")


class Encoder(Protocol):
    """A network that makes features from sound, and the window of sound that it needs for a block.

    left_samples: samples of the window before the block's first.
    right_frames: encoder frames of the window behind the block's last.
    num_states, width: l and d of the features.
    """

    left_samples: int
    right_frames: int
    num_states: int
    width: int

    @classmethod
    def load(cls, folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Self:
        """The encoder of a checkpoint's folder, its network in dtype. ValueError if config or weights do not fit."""
        ...

    @classmethod
    def tiny(cls) -> Self:
        """A small one with random weights, for tests."""
        ...

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write what `load` reads."""
        ...

    def encode(self, window: Tensor, statistics: Statistics) -> tuple[Tensor, Statistics]:
        """All hidden states around one block, and the statistics with what encoding found.

        window: (s,) sound at 16 kHz from left_samples before the block, or from the stream's start if that is later,
            to right_frames behind it.
        statistics: of all the stream's sound up to the window's end.
        Returns (l, t, d) float32 whose last frame is the block's last one, 24 k + 23, and which goes back to frame
        24 k - 1 or the stream's first.
        """
        ...


def read(config: type[Config], folder: Path) -> Config:
    """The encoder's configuration. ValueError if the folder's config.json has fields missing, surplus or wrong."""
    fields: dict[str, Any] = read_config(folder)
    try:
        return config(**fields)
    except TypeError as error:
        raise ValueError(f"{folder}/config.json is no {config.__name__}: {error}") from error
