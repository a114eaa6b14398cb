"""Tests of avatar.vae.picture.decoder in this process, in addition to the golden of sizes and fits (tests/parity)."""

import random
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch import Tensor

from avatar.vae.face import detector
from avatar.vae.face.detector import find_faces
from avatar.vae.picture import decoder
from avatar.vae.picture.decoder import MAX_SCANS, decode
from avatar.vae.picture.rule import Fit, PictureRule, Size
from tests.vae.face.scenes import CENTRE, PORTRAITS, SIDE, scene
from tests.vae.picture.files import (
    HEIC_PHOTO,
    file,
    half,
    interlaced,
    noise,
    photo,
    pixels_of,
    png_chunk,
    png_header,
    progressive_jpeg,
    webp_header,
)

COVER = PictureRule("cover", width=64, height=48)
FREE = PictureRule("reference", area=128 * 64)


def pixels(data: bytes, rule: PictureRule, size: Size | int | None = None, fit: Fit | None = None) -> Tensor:
    return pixels_of(decode(data, rule, size, fit).image)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF", "HEIC"])
def test_five_formats_are_read(kind: str) -> None:
    rgb = pixels(HEIC_PHOTO if kind == "HEIC" else file(photo(64, 48), kind), COVER)
    assert (rgb.shape, rgb.dtype) == ((48, 64, 3), torch.uint8)
    assert (rgb[:, -1, 0].float() - rgb[:, 0, 0].float()).min() > 150


def test_a_picture_of_the_videos_size_is_unchanged() -> None:
    image = photo(64, 48)
    assert torch.equal(pixels(file(image), COVER), pixels_of(image))
    image = photo(128, 64)
    assert torch.equal(pixels(file(image), FREE), pixels_of(image))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not a PNG, JPEG, WebP, HEIC or AVIF picture"),
        (b"GIF or text or anything", "not a PNG, JPEG, WebP, HEIC or AVIF picture"),
        (file(photo(32, 32), "GIF"), "not a PNG, JPEG, WebP, HEIC or AVIF picture"),
        (file(photo(32, 32), "BMP"), "not a PNG, JPEG, WebP, HEIC or AVIF picture"),
        (file(photo(1, 1)), "too small: 1x1, expected at least 16 pixels"),
        (file(photo(400, 15)), "too small: 400x15, expected at least 16 pixels"),
        (file(photo(32, 32), "TIFF"), "not a PNG, JPEG, WebP, HEIC or AVIF picture"),
        (png_header(20_000, 400), "too large: 20000x400, expected at most 16384 pixels"),
        (png_header(8192, 8192), "too large: 8192x8192 are 67.1 megapixels, at most 50 are accepted"),
        (png_header(20_000, 20_000), "too large: at most 50 megapixels are accepted"),
        (webp_header(16_383, 16_383), "too large: 16383x16383 are 268.4 megapixels"),
        (file(Image.new("P", (20_000, 20))), "too large: 20000x20, expected at most 16384 pixels"),
        (half(file(photo(300, 200))), "damaged or cut short"),
        (half(file(photo(300, 200), "JPEG")), "damaged or cut short"),
        (half(file(photo(300, 200), "WEBP")), "damaged or cut short"),
        (png_header(400, 400), "damaged or cut short"),
        (half(HEIC_PHOTO), "damaged or cut short"),
        (half(file(photo(300, 200), "AVIF")), "damaged or cut short"),
        (progressive_jpeg(64, 64, MAX_SCANS + 1), "more than 100 scans"),
    ],
)
@pytest.mark.parametrize("rule", [COVER, FREE])
def test_bad_pictures_are_refused_with_the_reason(data: bytes, words: str, rule: PictureRule) -> None:
    with pytest.raises(ValueError, match=words):
        pixels(data, rule)


def test_pillows_warnings_are_silenced() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match="too large"):
            pixels(png_header(10_000, 10_000), COVER)
        palette = photo(64, 48).quantize(8)
        pixels(file(palette, transparency=bytes([0, 128, 255])), FREE)
    assert not caught


def test_an_animation_gives_its_first_frame() -> None:
    first, second = photo(64, 48), Image.new("RGB", (64, 48), "black")
    for kind in ("PNG", "WEBP"):
        data = file(
            first, kind, save_all=True, append_images=[second], **({"lossless": True} if kind == "WEBP" else {})
        )
        assert torch.equal(pixels(data, COVER), pixels_of(first))


def test_transparent_parts_are_white_with_cover_and_ignored_with_reference() -> None:
    image = photo(64, 64, "RGBA")
    image.putalpha(Image.fromarray(np.repeat([[0], [255]], 32, axis=0).astype(np.uint8) * np.ones((1, 64), np.uint8)))
    opaque = pixels_of(photo(64, 64))
    square = PictureRule("cover", width=64, height=64)
    shown = pixels(file(image), square)
    assert (shown[:32] == 255).all()
    assert torch.equal(shown[32:], opaque[32:])
    assert torch.equal(pixels(file(image), square, fit="reference"), opaque)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "CMYK"])
def test_colour_modes_become_rgb(mode: str) -> None:
    data = file(photo(64, 48, mode), "JPEG" if mode == "CMYK" else "PNG")
    for rule in (COVER, FREE):
        assert pixels(data, rule).shape[2] == 3


def test_exif_orientation_applies_with_cover_and_not_with_reference() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright
    data = file(photo(128, 64), exif=exif.tobytes())
    upright = photo(128, 64).transpose(Image.Transpose.ROTATE_270)
    assert torch.equal(pixels(data, FREE, fit="cover"), pixels_of(upright))
    assert torch.equal(pixels(data, FREE, fit="reference"), pixels_of(photo(128, 64)))


def test_cover_fills_the_frame_and_keeps_the_centre() -> None:
    image = Image.new("RGB", (400, 100), "red")
    image.paste("blue", (150, 0, 250, 100))
    rgb = pixels(file(image), PictureRule("cover", width=64, height=64))
    assert (rgb == torch.tensor([0, 0, 255], dtype=torch.uint8)).all(dim=2)[:, 1:-1].all()


def test_a_requested_size_must_be_on_the_grid_and_within_the_area() -> None:
    data = file(photo(200, 100))
    assert pixels(data, FREE, size=(64, 128)).shape == (128, 64, 3)
    for size, words in (
        ((100, 64), "multiples of 64, got 100x64"),
        ((0, 64), "multiples of 64, got 0x64"),
        ((-64, 64), "multiples of 64"),
        ((128, 128), "at most 8192 pixels, got 128x128"),
    ):
        with pytest.raises(ValueError, match=words):
            pixels(data, FREE, size=size)


def test_a_fixed_size_refuses_others() -> None:
    data = file(photo(200, 100))
    assert pixels(data, COVER, size=(64, 48)).shape == (48, 64, 3)
    with pytest.raises(ValueError, match="size must be 64x48, the only one of this checkpoint, got 128x128"):
        pixels(data, COVER, size=(128, 128))


def test_an_unknown_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="fit must be one of cover, reference, face, got 'stretch'"):
        pixels(file(photo(64, 48)), COVER, fit="stretch")  # type: ignore[arg-type]


def test_a_portrait_like_the_training_data_keeps_its_pixels_under_the_fit_face() -> None:
    rule = PictureRule("face", width=128, height=128)
    for path in PORTRAITS:
        data = path.read_bytes()
        assert torch.equal(pixels(data, rule), pixels(data, rule, fit="cover")), path


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_face_at_the_side_of_a_landscape_fills_the_video(mode: str) -> None:
    data = file(scene((1600, 900), (1350, 470, 168)).convert(mode), "JPEG")
    decoded = decode(data, PictureRule("face", width=128, height=128))
    assert (decoded.framing.num_faces, decoded.framing.notice) == (1, "")
    assert decoded.framing.face_share == pytest.approx(168 * 168 / (1600 * 900), rel=0.1)
    (face,) = find_faces(decoded.image)
    assert (face.x, face.y, face.side) == pytest.approx((64, 128 * CENTRE, 128 * SIDE), abs=6)


def test_a_face_is_found_in_a_picture_as_it_is_shown() -> None:
    turned = scene((300, 200), (230, 100, 60)).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = file(turned, "JPEG", exif=exif)
    assert decode(data, COVER, fit="face").framing.num_faces == 1
    assert decode(data, COVER, fit="reference").framing.num_faces == 0  # it ignores the orientation


def test_a_halved_picture_shows_the_same_face(monkeypatch: pytest.MonkeyPatch) -> None:
    data = file(scene((800, 600), (600, 300, 160)), "PNG")
    whole = decode(data, COVER, fit="face")
    monkeypatch.setattr(decoder, "HALVED_PIXELS", 300_000)
    halved = decode(data, COVER, fit="face")
    assert halved.framing.face_share == pytest.approx(whole.framing.face_share, rel=0.1)
    (before,), (after,) = find_faces(whole.image), find_faces(halved.image)
    assert (after.x, after.y, after.side) == pytest.approx((before.x, before.y, before.side), abs=2)


def test_a_detector_that_fails_is_a_defect_and_not_the_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detector, "MODEL", Path("no such file"))
    detector.blazeface.cache_clear()
    with pytest.raises(FileNotFoundError):
        decode(file(photo(64, 48)), COVER)


def test_other_fits_say_that_they_show_no_face() -> None:
    data = file(scene((800, 450), (740, 220, 80)))
    for fit in ("cover", "reference"):
        notice = decode(data, COVER, fit=fit).framing.notice
        assert notice.startswith("No face is in the part of the picture that the video shows.")
    middle = file(scene((800, 450), (400, 220, 80)))
    assert decode(middle, COVER, fit="cover").framing.notice == ""


def test_as_many_scans_as_allowed_are_decoded_wherever_else_their_marker_occurs() -> None:
    data = progressive_jpeg(64, 64, MAX_SCANS)
    thumbnail = b"\xff\xe1" + (2 + 4 * MAX_SCANS).to_bytes(2, "big") + b"\xff\xda\xff\xda" * MAX_SCANS
    assert pixels(data[:2] + thumbnail + data[2:] + b"\xff\xda" * 2 * MAX_SCANS, COVER).shape == (48, 64, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_large_pictures_are_halved_and_keep_their_size_and_their_orientation(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(decoder, "HALVED_PIXELS", 10_000)
    width, height = 320, 192
    exif = Image.Exif()
    exif[0x0112] = 6
    small = photo(width, height)
    found = decode(file(small, kind, exif=exif.tobytes()), PictureRule("cover", width=height // 2, height=width // 2))
    assert found.size == (height, width)
    upright = pixels_of(photo(width, height).reduce(2).transpose(Image.Transpose.ROTATE_270))
    difference = (pixels_of(found.image).float() - upright.float()).abs()[..., :2]
    assert difference.mean() < 8  # of compression; a picture that is turned or cropped otherwise differs by 60


def test_damaged_metadata_do_not_spoil_a_picture() -> None:
    image = photo(64, 48)
    for exif in (b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0" + random.Random(0).randbytes(300)):
        assert torch.equal(pixels(file(image, exif=exif), COVER), pixels_of(image))


@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"tEXt", b"Workflow\0" + b"x" * 5_000_000),
        png_chunk(b"zTXt", b"Workflow\0\0" + zlib.compress(bytes(5_000_000))),
        png_chunk(b"iTXt", b"Workflow\0\1\0\0\0" + zlib.compress(bytes(5_000_000))),
        png_chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(5_000_000))),
    ],
    ids=["tEXt", "zTXt", "iTXt", "iCCP"],
)
def test_large_metadata_do_not_spoil_a_picture(chunk: bytes, before: bytes) -> None:
    data = file(photo(64, 48))
    at = data.index(before) - 4
    decoded = decode(data[:at] + chunk + data[at:], COVER)
    assert torch.equal(pixels_of(decoded.image), pixels_of(photo(64, 48)))
    assert "cut short" not in decoded.framing.notice


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "RGB", {}),
        ("JPEG", "RGB", {"progressive": True}),
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("PNG", "RGB", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
    ],
)
def test_a_picture_that_lacks_its_end_is_shown_with_a_notice(kind: str, mode: str, options: dict[str, Any]) -> None:
    data = file(noise().convert(mode), kind, **options)
    rule = PictureRule("cover", width=192, height=160)
    whole, cut = decode(data, rule), decode(data[: int(0.97 * len(data))], rule)
    assert cut.framing.notice.startswith("The file is cut short or damaged")
    assert "cut short" not in whole.framing.notice
    upper = 128  # the lowest blocks have 16 rows
    if not options:
        assert torch.equal(pixels_of(cut.image)[:upper], pixels_of(whole.image)[:upper])
    difference = (pixels_of(cut.image)[:upper].float() - pixels_of(whole.image)[:upper].float()).abs()
    assert difference.mean() < 8  # of a progressive JPEG's last scan


def test_a_jpeg_without_its_end_marker_loses_nothing() -> None:
    for options in ({}, {"progressive": True}):
        data = file(noise(), "JPEG", **options)
        rule = PictureRule("cover", width=192, height=160)
        assert torch.equal(pixels(data[:-2], rule), pixels(data, rule))


@pytest.mark.parametrize(("kind", "share"), [("JPEG", 0.8), ("PNG", 0.85), ("PNG interlaced", 0.97)])
def test_a_picture_that_lacks_more_than_a_tenth_of_its_rows_is_refused(kind: str, share: float) -> None:
    data = interlaced(noise()) if kind == "PNG interlaced" else file(noise(), kind)
    assert decode(data, COVER).image.size == (64, 48)
    with pytest.raises(ValueError, match="damaged or cut short; send the whole file"):
        decode(data[: int(share * len(data))], COVER)
