"""Tests of avatar.vae.face.detector."""

import hashlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from avatar.vae.face import detector
from avatar.vae.face.detector import MODEL, SHA256, BlazeFace, find_faces, overlap, starts
from tests.vae.face.scenes import CENTRE, PORTRAITS, SIDE, background, portrait, scene


def assert_finds(image: Image.Image, *faces: tuple[float, float, float]) -> None:
    """Fail unless exactly these faces are found, in this order, each within a quarter of its side."""
    found = find_faces(image)
    assert len(found) == len(faces)
    for face, (x, y, side) in zip(found, faces, strict=True):
        assert (face.x, face.y) == pytest.approx((x, y), abs=side / 4)
        assert face.side == pytest.approx(side, rel=0.25)


def test_the_models_file_is_the_published_one() -> None:
    assert hashlib.sha256(MODEL.read_bytes()).hexdigest() == SHA256
    readme = MODEL.with_name("README.md").read_text(encoding="utf-8")
    assert SHA256 in readme
    assert MODEL.name in readme
    assert "Apache License" in MODEL.with_name("LICENSE").read_text(encoding="utf-8")


def test_a_damaged_model_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    damaged = tmp_path / MODEL.name
    damaged.write_bytes(MODEL.read_bytes()[:-1])
    monkeypatch.setattr(detector, "MODEL", damaged)
    with pytest.raises(RuntimeError, match=f"{MODEL.name} is damaged"):
        BlazeFace()


@pytest.mark.parametrize("number", range(len(PORTRAITS)))
def test_each_shipped_portrait_has_one_face_with_the_margin_of_the_training_data(number: int) -> None:
    image = portrait(number)
    (face,) = find_faces(image)
    assert face.side / image.width == pytest.approx(SIDE, abs=0.04)
    assert (face.x / image.width, face.y / image.width) == pytest.approx((0.5, CENTRE), abs=0.03)


@pytest.mark.parametrize(
    "face",
    [
        (1350, 470, 168),  # at the right, as in many photographs
        (800, 450, 32),  # a fiftieth of the longer side
        (1570, 870, 100),  # in the corner, with a third of it outside
    ],
)
def test_a_face_of_any_size_is_found_anywhere_in_a_landscape(face: tuple[float, float, float]) -> None:
    assert_finds(scene((1600, 900), face), face)


def test_all_faces_are_found_largest_first() -> None:
    faces = (900, 300, 160), (250, 300, 120), (560, 320, 70)
    assert_finds(scene((1200, 600), *faces), *faces)


def test_a_face_that_is_much_smaller_than_another_is_background() -> None:
    largest = (400, 450, 420)
    assert_finds(scene((1600, 900), largest, (1300, 300, 40)), largest)


def test_pictures_without_a_face_have_none() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3)).astype(np.uint8)
    for image in (
        background(800, 450),
        Image.fromarray(noise),
        Image.new("RGB", (16, 16)),
        Image.new("L", (16, 4000)),
    ):
        assert find_faces(image) == []


@pytest.mark.parametrize("number", [0, 3])
def test_a_face_that_is_not_upright_is_not_found(number: int) -> None:
    for turn in (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270):
        assert find_faces(portrait(number).transpose(turn)) == []


def test_a_tilted_face_is_found() -> None:
    for degrees in (-30, 30):
        assert len(find_faces(portrait(0).rotate(degrees, Image.Resampling.BICUBIC))) == 1


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_modes_than_rgb_are_searched(mode: str) -> None:
    face = (300, 200, 90)
    assert_finds(scene((800, 400), face).convert(mode), face)


@pytest.mark.parametrize("length", [1, 100, 128, 129, 200, 300, 1024])
def test_windows_cover_every_pixel_and_overlap(length: int) -> None:
    windows = starts(length)
    assert windows[0] <= 0
    assert windows[-1] + 128 >= length
    assert all(0 < after - before <= 86 for before, after in pairwise(windows))


def test_overlap_is_intersection_over_union() -> None:
    box = np.array([0, 0, 2, 2], np.float32)
    boxes = np.array([[0, 0, 2, 2], [1, 1, 3, 3], [2, 0, 4, 2]], np.float32)
    assert overlap(box, boxes).tolist() == pytest.approx([1, 1 / 7, 0])
