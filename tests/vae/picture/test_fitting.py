"""Tests of avatar.vae.picture.fitting, in addition to the golden of sizes and fits (tests/parity)."""

import pytest
import torch
from PIL import Image

from avatar.vae.picture.fitting import fit_crop, fit_image, fit_reference
from tests.vae.picture.files import photo, pixels_of


def test_a_crop_inside_an_image_is_that_part_of_it() -> None:
    image = photo(200, 100)
    assert torch.equal(pixels_of(fit_crop(image, (64, 48), (30, 20, 94, 68))), pixels_of(image)[20:68, 30:94])
    assert torch.equal(
        pixels_of(fit_crop(image, (64, 32), (0, 0, 200, 100))), pixels_of(fit_image(image, (64, 32), "face"))
    )


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_crop_that_reaches_beyond_an_image_repeats_its_edge(mode: str) -> None:
    image = photo(40, 100, mode)
    wide = pixels_of(fit_crop(image, (80, 50), (-20, 30, 60, 80)))
    inside = pixels_of(image)[30:80]
    assert torch.equal(wide[:, 20:60], inside)
    assert torch.equal(wide[:, :20], inside[:, :1].expand_as(wide[:, :20]))
    assert torch.equal(wide[:, 60:], inside[:, -1:].expand_as(wide[:, 60:]))
    turned = image.transpose(Image.Transpose.TRANSPOSE)
    tall = pixels_of(fit_crop(turned, (50, 80), (30, -20, 80, 60)))
    assert torch.equal(tall, wide.transpose(0, 1))


def test_the_references_odd_padding_is_larger_on_the_right() -> None:
    # 407 columns become 625, of 640.
    filled = pixels_of(fit_reference(Image.new("RGB", (407, 250), "white"), (640, 384))).amin(dim=(0, 2))
    assert torch.equal(filled.nonzero()[:, 0], torch.arange(7, 632))


@pytest.mark.parametrize(("width", "left"), [(130, 1), (131, 2), (133, 2), (135, 4)])
def test_the_references_crop_rounds_halves_to_even(width: int, left: int) -> None:
    image = photo(width, 128)
    assert torch.equal(pixels_of(fit_reference(image, (128, 128))), pixels_of(image)[:, left : left + 128])
