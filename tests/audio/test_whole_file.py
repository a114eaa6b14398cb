"""Tests of avatar.audio.whole_file, in addition to the goldens of its features (tests/parity)."""

import pytest
import torch
from einops import rearrange
from torch import Tensor

from avatar.audio import whole_file


def ramp(length: int) -> Tensor:
    """States that hold their indexes, (1, t, 1)."""
    return rearrange(torch.arange(float(length)), "t -> 1 t 1")


def test_audio_is_normalised_over_the_whole_file(speech: Tensor) -> None:
    audio = whole_file.normalise(3 * whole_file.to_16khz(speech, 16000) + 0.1)
    assert abs(float(audio.mean())) < 1e-5
    assert abs(float(audio.std()) - 1) < 1e-4


def test_the_grids_length_follows_float_arithmetic() -> None:
    assert 3 * 205 // 5 == 123
    assert whole_file.to_grid(ramp(205)).shape[1] == 122


def test_audio_of_one_encoder_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="two encoder frames or more, got 1"):
        whole_file.to_grid(ramp(1))
