"""Tests of avatar.vae.picture.rule, in addition to the golden of sizes and fits (tests/parity)."""

from typing import Any

import numpy as np
import pytest

from avatar.vae.picture.rule import PictureRule, Size, size_within


def test_a_size_is_always_on_the_grid_and_within_the_area() -> None:
    rng = np.random.default_rng(0)
    for width, height in rng.integers(16, 8193, (300, 2)).tolist():
        size = size_within((width, height), 98304)
        assert min(size) >= 64
        assert all(side % 64 == 0 for side in size)
        assert size[0] * size[1] <= 98304


def test_a_picture_too_narrow_for_any_size_is_refused() -> None:
    with pytest.raises(ValueError, match="8192x16 is too narrow"):
        size_within((8192, 16), 8192)


@pytest.mark.parametrize(
    "fields", [{}, {"width": 64}, {"width": 64, "height": 64, "area": 4096}, {"area": 0}, {"width": -64, "height": 64}]
)
def test_a_rule_has_a_size_or_an_area(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"picture rule|picture\.(area|width) must be"):
        PictureRule("cover", **fields)


SERVED: tuple[Size, ...] = ((704, 384), (640, 448), (512, 512), (448, 640), (384, 704))


def test_a_checkpoint_of_free_sizes_serves_those_of_usual_pictures() -> None:
    assert PictureRule("reference", area=288_000).limited().sizes == SERVED
    assert PictureRule("reference", area=98_304).limited().sizes == ((384, 256), (256, 256), (256, 384))
    assert PictureRule("reference", area=288_000).limited(((512, 320),)).all_sizes == ((512, 320),)
    assert PictureRule("cover", area=288_000, sizes=((512, 320),)).limited().all_sizes == ((512, 320),)


@pytest.mark.parametrize(
    ("picture", "size"),
    [
        ((1920, 1080), (704, 384)),
        ((3000, 2000), (640, 448)),
        ((1600, 1000), (640, 448)),  # 704x384 is as near, and would have bars
        ((900, 1000), (512, 512)),
        ((1080, 1350), (512, 512)),
        ((1200, 1600), (448, 640)),
        ((1080, 2400), (384, 704)),
    ],
)
def test_a_picture_gets_the_served_size_nearest_to_its_shape(picture: Size, size: Size) -> None:
    rule = PictureRule("reference", area=288_000).limited()
    assert rule.video_size(picture) == size
    assert rule.video_size(picture, 288_000) == size
    assert rule.video_size(picture, (448, 640)) == (448, 640)
    assert rule.video_size(picture, 263_000) == (512, 512)


def test_a_size_that_is_not_served_is_refused() -> None:
    rule = PictureRule("cover", area=288_000).limited()
    with pytest.raises(
        ValueError, match=r"size must be one of 704x384, .* of this deployment, or left out, got 640x384"
    ):
        rule.check((640, 384))
    with pytest.raises(ValueError, match="area must be at least 262144, that of the smallest size, got 4096"):
        rule.check(4096)
    with pytest.raises(ValueError, match="sizes must have 1 to 288000 pixels, got 1280x720"):
        PictureRule("cover", area=288_000).limited(((1280, 720),))
    with pytest.raises(ValueError, match="size must be 128x96, the only one of this checkpoint, got 512x320"):
        PictureRule("cover", width=128, height=96).limited(((512, 320),))
