from fractions import Fraction
from itertools import pairwise

import torch
from einops import rearrange

from avatar.audio import whole_file
from avatar.audio.alignment import frame_weights, window_end
from avatar.audio.model import interpolate


def test_pixel_frames_lie_exactly_at_the_nearest_point_of_the_30_hz_grid() -> None:
    for index in range(200):
        frames, weights = frame_weights(index)
        for f, (frame, weight) in enumerate(zip(frames, weights, strict=True)):
            point = round(Fraction((12 * index + f) * 30, 25))
            assert 0 <= weight < 1
            assert Fraction(3 * frame + round(3 * weight), 3) == Fraction(5 * point, 3)


def test_blocks_use_frames_from_one_before_them_to_their_last() -> None:
    used = []
    for index in range(100):
        frames, weights = frame_weights(index)
        used += [frame - 24 * index for frame in frames]
        used += [frame + 1 - 24 * index for frame, weight in zip(frames, weights, strict=True) if weight]
    assert (min(used), max(used)) == (-1, 23)


def test_windows_end_one_block_apart_for_hours() -> None:
    ends = [window_end(index, right_frames=10) for index in range(20_000)]
    assert ends[0] == 7680 + 80 + 3200
    assert {after - before for before, after in pairwise(ends)} == {7680}


def test_interpolation_is_the_limit_of_the_rule_for_files() -> None:
    ramp = rearrange(torch.arange(50.0 * 600), "t -> 1 t 1")  # ten minutes of frames that hold their indexes
    whole = whole_file.bucket(whole_file.to_grid(ramp))[: 12 * 10, 0, 0]
    blocks = [interpolate(ramp[:, : 24 * (index + 1)], index)[0, 0] for index in range(10)]
    torch.testing.assert_close(torch.cat(blocks), whole, atol=0.01, rtol=0)
