"""Tests of avatar.vae.picture.fitting, in addition to the golden of sizes and fits (tests/parity)."""

import pytest
import torch
from PIL import Image

from avatar.vae.picture.fitting import fit_reference
from tests.vae.picture.files import photo, pixels_of


def test_the_references_odd_padding_is_larger_on_the_right() -> None:
    # 407 columns become 625, of 640.
    filled = pixels_of(fit_reference(Image.new("RGB", (407, 250), "white"), (640, 384))).amin(dim=(0, 2))
    assert torch.equal(filled.nonzero()[:, 0], torch.arange(7, 632))


@pytest.mark.parametrize(("width", "left"), [(130, 1), (131, 2), (133, 2), (135, 4)])
def test_the_references_crop_rounds_halves_to_even(width: int, left: int) -> None:
    image = photo(width, 128)
    assert torch.equal(pixels_of(fit_reference(image, (128, 128))), pixels_of(image)[:, left : left + 128])
