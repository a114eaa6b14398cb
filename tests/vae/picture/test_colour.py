"""Tests of avatar.vae.picture.colour, through the decoder in this process."""

import struct
import zlib

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from avatar.vae.picture.decoder import decode
from avatar.vae.picture.rule import Fit, PictureRule
from tests.vae.picture.files import HEIC_WIDE_GAMUT, file, photo, pixels_of, png_chunk

WIDTH, HEIGHT = 64, 48
# Of the red, green and blue of a wide gamut (ProPhoto RGB) in XYZ under D50, in columns, and of sRGB.
WIDE = np.array([[0.7977, 0.1352, 0.0313], [0.2880, 0.7119, 0.0001], [0.0, 0.0, 0.8249]])
SRGB = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])
GAMMA = 1.8


def pixels(data: bytes, fit: Fit = "cover") -> Tensor:
    return pixels_of(decode(data, PictureRule(fit, width=WIDTH, height=HEIGHT)).image)


def profile(space: bytes, kind: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """Return an ICC profile of version 2.4 with these tags.

    Source: ICC.1:2001-04, section 6.
    """
    white = b"XYZ " + bytes(4) + numbers([0.9642, 1.0, 0.8249])
    tags = {b"wtpt": white, **tags}
    start, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, tag in tags.items():
        table += name + struct.pack(">II", start + len(body), len(tag))
        body += tag + bytes(-len(tag) % 4)
    header = struct.pack(">I4sI4s4s4s", start + len(body), bytes(4), 0x02400000, kind, space, connection)
    header += bytes(12) + b"acsp" + bytes(28) + numbers([0.9642, 1.0, 0.8249])
    return header + bytes(128 - len(header)) + struct.pack(">I", len(tags)) + table + body


def numbers(values: list[float]) -> bytes:
    """Return numbers as s15Fixed16."""
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def display_profile(primaries: NDArray[np.float64], gamma: float) -> bytes:
    """Return the profile of a display. primaries: (3, 3), red, green and blue in columns."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))
    tags = {
        name: b"XYZ " + bytes(4) + numbers(primaries[:, at].tolist())
        for at, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))
    }
    return profile(b"RGB ", b"mntr", b"XYZ ", {**tags, b"rTRC": curve, b"gTRC": curve, b"bTRC": curve})


def grey_profile(gamma: float) -> bytes:
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))
    return profile(b"GRAY", b"mntr", b"XYZ ", {b"kTRC": curve})


def press_profile() -> bytes:
    """Return the profile of a press on whose paper cyan ink is red, and no other ink shows."""
    ramp = bytes(range(256))
    paper, red = (255, 128, 128), (136, 208, 195)  # as 8-bit Lab
    colours = [red if cyan else paper for cyan in (0, 1) for _ in range(8)]
    grid = bytes(value for colour in colours for value in colour)
    identity = numbers([1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0])
    lut = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + identity + ramp * 4 + grid + ramp * 3
    return profile(b"CMYK", b"prtr", b"Lab ", {b"A2B0": lut, b"A2B1": lut})


def to_srgb(rgb: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Convert pixels (h, w, 3) of the wide display to sRGB by the formulas of the profiles."""
    linear = (rgb / 255) ** GAMMA @ (np.linalg.inv(SRGB) @ WIDE).T
    linear = linear.clip(0, 1)
    srgb: NDArray[np.float64] = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return srgb


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF", "HEIC"])
def test_pixels_are_converted_from_their_profile_to_srgb(kind: str) -> None:
    image = Image.new("RGB", (WIDTH, HEIGHT), (150, 130, 110))
    data = HEIC_WIDE_GAMUT if kind == "HEIC" else file(image, kind, icc_profile=display_profile(WIDE, GAMMA))
    found = pixels(data)
    expected = to_srgb(np.array([[[150, 130, 110]]], np.uint8))
    assert np.abs(expected - (150, 130, 110)).max() > 15
    assert np.abs(found.numpy() - expected).max() <= (2 if kind == "PNG" else 5)


def test_transparent_parts_of_a_picture_with_a_profile_are_white() -> None:
    image = Image.new("RGBA", (WIDTH, HEIGHT), (150, 130, 110, 0))
    image.paste((150, 130, 110, 255), (0, 0, WIDTH // 2, HEIGHT))
    found = pixels(file(image, icc_profile=display_profile(WIDE, GAMMA)))
    assert (found[:, WIDTH // 2 + 2 :] >= 254).all()
    assert np.abs(found[0, 0].numpy() - to_srgb(np.array([150, 130, 110], np.uint8))).max() <= 2


def test_grey_is_converted_from_its_profile() -> None:
    found = pixels(file(Image.new("L", (WIDTH, HEIGHT), 100), icc_profile=grey_profile(1.0)))
    assert (found.float() - 168).abs().max() <= 2  # sRGB of 100 / 255 of white's light


def test_inks_are_converted_through_their_profile_and_without_one_by_the_plain_formula() -> None:
    inks = Image.new("CMYK", (WIDTH, HEIGHT), (255, 0, 0, 0))
    red, green, blue = pixels(file(inks, "JPEG", quality=95, icc_profile=press_profile()))[0, 0].tolist()
    assert red > 200
    assert max(green, blue) < 60
    cyan = pixels(file(inks, "JPEG", quality=95))[0, 0]
    assert (cyan.float() - torch.tensor([0.0, 255.0, 255.0])).abs().max() <= 3


def test_a_profile_of_another_kind_of_colour_or_a_damaged_one_is_ignored() -> None:
    image = photo(WIDTH, HEIGHT)
    for wrong in (press_profile(), grey_profile(1.0), display_profile(WIDE, GAMMA)[:150], b"no profile"):
        assert torch.equal(pixels(file(image, icc_profile=wrong)), pixels_of(image))


def test_the_reference_fit_ignores_profiles() -> None:
    image = photo(WIDTH, HEIGHT)
    assert torch.equal(pixels(file(image, icc_profile=display_profile(WIDE, GAMMA)), "reference"), pixels_of(image))


@pytest.mark.parametrize("fit", ["cover", "reference"])
def test_16_bit_grey_is_scaled_to_8_bits(fit: Fit) -> None:
    values = np.linspace(0, 65535, WIDTH * HEIGHT).astype(np.uint16).reshape(HEIGHT, WIDTH)
    found = pixels(file(Image.fromarray(values)), fit)
    assert (int(found.min()), int(found.max())) == (0, 255)
    assert np.abs(found.numpy() - values[..., None] / 257).max() <= 0.5


def test_16_bit_colour_is_scaled_to_8_bits() -> None:
    row = b"\0" + struct.pack(">3H", 65535, 32768, 0) * WIDTH
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(row * HEIGHT)) + png_chunk(b"IEND", b"")
    assert (pixels(data) == torch.tensor([255, 128, 0])).all()


def test_a_colour_key_is_white_in_every_mode() -> None:
    for image, key in (
        (Image.new("L", (WIDTH, HEIGHT), 7), 7),
        (Image.fromarray(np.full((HEIGHT, WIDTH), 300, np.uint16)), 300),
        (Image.new("RGB", (WIDTH, HEIGHT), (1, 2, 3)), (1, 2, 3)),
        (Image.new("1", (WIDTH, HEIGHT), 0), 0),
        (photo(WIDTH, HEIGHT).quantize(2), bytes(2)),
    ):
        assert (pixels(file(image, transparency=key)) == 255).all(), image.mode
