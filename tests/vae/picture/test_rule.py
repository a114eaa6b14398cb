"""Tests of avatar.vae.picture.rule, in addition to the golden of sizes and fits (tests/parity)."""

import numpy as np
import pytest

from avatar.vae.picture.rule import PictureRule, size_within


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
def test_a_rule_has_a_size_or_an_area(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="picture rule"):
        PictureRule("cover", **fields)
