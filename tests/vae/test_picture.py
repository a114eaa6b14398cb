"""Tests of avatar.vae.picture, in addition to the golden of sizes and fits (tests/parity)."""

import io
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from avatar.vae.picture import PictureRule, fit_reference, read_picture, size_within, to_pixels

COVER = PictureRule("cover", width=64, height=48)
FREE = PictureRule("reference", area=128 * 64)


def photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Red grows to the right, green downwards, blue is a checkerboard."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    blue = (np.arange(width) // 4 + np.arange(height)[:, None] // 4) % 2 * 255
    return Image.fromarray(np.stack([x, y, blue], axis=2).astype(np.uint8)).convert(mode)


def file(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def png_header(width: int, height: int) -> bytes:
    """Return a PNG whose header claims a size, with hardly any pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def pixels_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_three_formats_are_read(kind: str) -> None:
    rgb = read_picture(file(photo(64, 48), kind), COVER)
    assert (rgb.shape, rgb.dtype) == ((48, 64, 3), torch.uint8)
    assert (rgb[:, -1, 0].float() - rgb[:, 0, 0].float()).min() > 150


def test_a_picture_of_the_videos_size_is_unchanged() -> None:
    image = photo(64, 48)
    assert torch.equal(read_picture(file(image), COVER), pixels_of(image))
    image = photo(128, 64)
    assert torch.equal(read_picture(file(image), FREE), pixels_of(image))


def test_pixels_are_numbers_from_minus_one_to_one() -> None:
    rgb = torch.tensor([[[0, 51, 255]]], dtype=torch.uint8)
    torch.testing.assert_close(to_pixels(rgb), torch.tensor([-1, -0.6, 1]).view(3, 1, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not a PNG, JPEG or WebP picture"),
        (b"GIF or text or anything", "not a PNG, JPEG or WebP picture"),
        (file(photo(32, 32), "GIF"), "not a PNG, JPEG or WebP picture"),
        (file(photo(32, 32), "BMP"), "not a PNG, JPEG or WebP picture"),
        (file(photo(1, 1)), "too small: 1x1, expected at least 16 pixels"),
        (file(photo(400, 15)), "too small: 400x15, expected at least 16 pixels"),
        (png_header(20_000, 400), "too large: 20000x400, expected at most 8192 pixels"),
        (png_header(10_000, 10_000), "too large: 10000x10000, expected at most 8192 pixels"),
        (png_header(20_000, 20_000), "too large, at most 8192 pixels a side"),
        (file(Image.new("P", (20_000, 20))), "too large: 20000x20, expected at most 8192 pixels"),
        (half(file(photo(300, 200))), "damaged or cut short"),
        (half(file(photo(300, 200), "JPEG")), "damaged or cut short"),
        (half(file(photo(300, 200), "WEBP")), "damaged or cut short"),
        (png_header(400, 400), "damaged or cut short"),
        (file(Image.new("I;16", (32, 32))), "8 bits a channel"),
    ],
)
@pytest.mark.parametrize("rule", [COVER, FREE])
def test_bad_pictures_are_refused_with_the_reason(data: bytes, words: str, rule: PictureRule) -> None:
    with pytest.raises(ValueError, match=words):
        read_picture(data, rule)


def test_pillows_warnings_are_silenced() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match="too large"):
            read_picture(png_header(10_000, 10_000), COVER)
        palette = photo(64, 48).quantize(8)
        read_picture(file(palette, transparency=bytes([0, 128, 255])), FREE)
    assert not caught


def test_an_animation_gives_its_first_frame() -> None:
    first, second = photo(64, 48), Image.new("RGB", (64, 48), "black")
    for kind in ("PNG", "WEBP"):
        data = file(
            first, kind, save_all=True, append_images=[second], **({"lossless": True} if kind == "WEBP" else {})
        )
        assert torch.equal(read_picture(data, COVER), pixels_of(first))


def test_transparent_parts_are_white_with_cover_and_ignored_with_reference() -> None:
    image = photo(64, 64, "RGBA")
    image.putalpha(Image.fromarray(np.repeat([[0], [255]], 32, axis=0).astype(np.uint8) * np.ones((1, 64), np.uint8)))
    opaque = pixels_of(photo(64, 64))
    square = PictureRule("cover", width=64, height=64)
    shown = read_picture(file(image), square)
    assert (shown[:32] == 255).all()
    assert torch.equal(shown[32:], opaque[32:])
    assert torch.equal(read_picture(file(image), square, fit="reference"), opaque)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "CMYK"])
def test_colour_modes_become_rgb(mode: str) -> None:
    data = file(photo(64, 48, mode), "JPEG" if mode == "CMYK" else "PNG")
    for rule in (COVER, FREE):
        assert read_picture(data, rule).shape[2] == 3


def test_exif_orientation_applies_with_cover_and_not_with_reference() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright
    data = file(photo(128, 64), exif=exif.tobytes())
    upright = photo(128, 64).transpose(Image.Transpose.ROTATE_270)
    assert torch.equal(read_picture(data, FREE, fit="cover"), pixels_of(upright))
    assert torch.equal(read_picture(data, FREE, fit="reference"), pixels_of(photo(128, 64)))


def test_cover_fills_the_frame_and_keeps_the_centre() -> None:
    image = Image.new("RGB", (400, 100), "red")
    image.paste("blue", (150, 0, 250, 100))
    rgb = read_picture(file(image), PictureRule("cover", width=64, height=64))
    assert (rgb == torch.tensor([0, 0, 255], dtype=torch.uint8)).all(dim=2)[:, 1:-1].all()


def test_the_references_odd_padding_is_larger_on_the_right() -> None:
    # 407 columns become 625, of 640.
    filled = pixels_of(fit_reference(Image.new("RGB", (407, 250), "white"), (640, 384))).amin(dim=(0, 2))
    assert torch.equal(filled.nonzero()[:, 0], torch.arange(7, 632))


@pytest.mark.parametrize(("width", "left"), [(130, 1), (131, 2), (133, 2), (135, 4)])
def test_the_references_crop_rounds_halves_to_even(width: int, left: int) -> None:
    image = photo(width, 128)
    assert torch.equal(pixels_of(fit_reference(image, (128, 128))), pixels_of(image)[:, left : left + 128])


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


def test_a_requested_size_must_be_on_the_grid_and_within_the_area() -> None:
    data = file(photo(200, 100))
    assert read_picture(data, FREE, size=(64, 128)).shape == (128, 64, 3)
    for size, words in (
        ((100, 64), "multiples of 64, got 100x64"),
        ((0, 64), "multiples of 64, got 0x64"),
        ((-64, 64), "multiples of 64"),
        ((128, 128), "at most 8192 pixels, got 128x128"),
    ):
        with pytest.raises(ValueError, match=words):
            read_picture(data, FREE, size=size)


def test_a_fixed_size_refuses_others() -> None:
    data = file(photo(200, 100))
    assert read_picture(data, COVER, size=(64, 48)).shape == (48, 64, 3)
    with pytest.raises(ValueError, match="size must be 64x48, the only one of this checkpoint, got 128x128"):
        read_picture(data, COVER, size=(128, 128))


def test_an_unknown_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="fit must be one of cover, reference, got 'stretch'"):
        read_picture(file(photo(64, 48)), COVER, fit="stretch")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields", [{}, {"width": 64}, {"width": 64, "height": 64, "area": 4096}, {"area": 0}, {"width": -64, "height": 64}]
)
def test_a_rule_has_a_size_or_an_area(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="picture rule"):
        PictureRule("cover", **fields)
