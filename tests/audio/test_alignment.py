from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from einops import rearrange

from avatar.audio import whole_file
from avatar.audio.alignment import BlockGrid
from avatar.audio.model import interpolate

GRID = BlockGrid(3)
every_length = pytest.mark.parametrize("latents", [1, 2, 3])


@every_length
def test_pixel_frames_lie_exactly_at_the_nearest_point_of_the_30_hz_grid(latents: int) -> None:
    for index in range(200):
        frames, weights = BlockGrid(latents).frame_weights(index)
        for f, (frame, weight) in enumerate(zip(frames, weights, strict=True)):
            point = round(Fraction((4 * latents * index + f) * 30, 25))
            assert 0 <= weight < 1
            assert Fraction(3 * frame + round(3 * weight), 3) == Fraction(5 * point, 3)


@every_length
def test_blocks_use_frames_from_one_before_them_to_their_last(latents: int) -> None:
    used, num_frames = [], 8 * latents
    for index in range(100):
        frames, weights = BlockGrid(latents).frame_weights(index)
        used += [frame - num_frames * index for frame in frames]
        used += [frame + 1 - num_frames * index for frame, weight in zip(frames, weights, strict=True) if weight]
    assert (min(used), max(used)) == (-1, num_frames - 1)


def test_blocks_of_every_length_place_their_frames_alike() -> None:
    placed = []
    for latents in (1, 2, 3):
        blocks = [BlockGrid(latents).frame_weights(index) for index in range(60 // latents)]
        placed.append([pair for frames, weights in blocks for pair in zip(frames, weights, strict=True)])
    assert placed[0] == placed[1] == placed[2]


@every_length
def test_a_block_lasts_as_long_in_audio_as_in_video(latents: int) -> None:
    grid = BlockGrid(latents)
    assert grid.duration_s == grid.samples / 16000 == grid.encoder_frames / 50 == grid.frames / 25


def test_windows_end_one_block_apart_for_hours() -> None:
    ends = [GRID.window_end(index, right_frames=10) for index in range(20_000)]
    assert ends[0] == 7680 + 80 + 3200
    assert {after - before for before, after in pairwise(ends)} == {7680}


def test_interpolation_is_the_limit_of_the_rule_for_files() -> None:
    ramp = rearrange(torch.arange(50.0 * 600), "t -> 1 t 1")  # ten minutes of frames that hold their indexes
    whole = whole_file.bucket(whole_file.to_grid(ramp))[: 12 * 10, 0, 0]
    blocks = [interpolate(ramp[:, : 24 * (index + 1)], index, GRID)[0, 0] for index in range(10)]
    torch.testing.assert_close(torch.cat(blocks), whole, atol=0.01, rtol=0)


@pytest.mark.parametrize(("num_samples", "rate_hz", "expected"), [(1, 8000, 1), (7680, 16000, 1), (7681, 16000, 2)])
def test_blocks_hold_all_samples(num_samples: int, rate_hz: int, expected: int) -> None:
    assert GRID.num_blocks(num_samples, rate_hz) == expected
    assert GRID.num_blocks(3 * num_samples, 3 * rate_hz) == expected
