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


def test_grid_and_states_align_at_both_ends() -> None:
    grid = whole_file.to_grid(ramp(149))[0, :, 0]
    assert len(grid) == 89
    assert (float(grid[0]), float(grid[-1])) == (0.0, 148.0)


def test_the_grids_length_follows_float_arithmetic() -> None:
    assert 3 * 205 // 5 == 123
    assert whole_file.to_grid(ramp(205)).shape[1] == 122


def test_audio_of_one_encoder_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="two encoder frames or more, got 1"):
        whole_file.to_grid(ramp(1))


def test_frames_after_the_end_are_zero_and_an_empty_clip_follows_a_full_one() -> None:
    frames = whole_file.bucket(ramp(288) + 1)
    assert len(frames) == 48 * 6
    assert frames[:240].all()
    assert not frames[240:].any()


def test_neighbours_stop_at_the_ends() -> None:
    frames = whole_file.bucket(ramp(14), neighbours=2)
    assert frames[0, 0].tolist() == [0, 0, 0, 1, 2]
    assert frames[11, 0].tolist() == [11, 12, 13, 13, 13]
    assert not frames[12:].any()


def test_the_networks_input_has_frames_last() -> None:
    assert whole_file.model_input(torch.zeros(48, 5, 32)).shape == (1, 5, 32, 48)
