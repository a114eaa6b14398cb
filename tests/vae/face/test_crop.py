"""Tests of avatar.vae.face.crop: geometry and notices, with faces given."""

import pytest
from hypothesis import given, settings, strategies

from avatar.vae.face.crop import (
    Box,
    Face,
    centre_crop,
    clipped,
    face_crop,
    frame_centre,
    frame_face,
    reference_crop,
)
from avatar.vae.picture.rule import Size

SQUARE = (128, 128)


def face(x: float, y: float, side: float) -> Face:
    return Face(x, y, side, 0.9)


@pytest.mark.parametrize(
    ("picture", "video", "crop"),
    [
        ((1600, 900), SQUARE, (350, 0, 1250, 900)),
        ((600, 900), SQUARE, (0, 150, 600, 750)),
        ((64, 64), SQUARE, (0, 0, 64, 64)),
        ((1000, 1000), (200, 100), (0, 250, 1000, 750)),
    ],
)
def test_the_centre_crop_is_the_largest_of_the_videos_shape(picture: Size, video: Size, crop: Box) -> None:
    assert centre_crop(picture, video) == pytest.approx(crop)


@pytest.mark.parametrize(
    ("video", "crop"),
    [
        (SQUARE, (500, 345, 600, 445)),
        ((256, 128), (450, 345, 650, 445)),
        ((128, 256), (500, 345, 600, 545)),
    ],
)
def test_a_face_gets_the_stated_margin_in_any_shape(video: Size, crop: Box) -> None:
    assert face_crop(face(550, 400, 56), (1600, 900), video) == pytest.approx(crop)


@pytest.mark.parametrize(
    ("x", "y", "crop"),
    [
        (10, 20, (0, 0, 200, 200)),
        (1590, 880, (1400, 700, 1600, 900)),
        (1590, 400, (1400, 290, 1600, 490)),
    ],
)
def test_a_crop_is_moved_into_the_picture(x: float, y: float, crop: Box) -> None:
    assert face_crop(face(x, y, 112), (1600, 900), SQUARE) == pytest.approx(crop)


def test_a_crop_larger_than_the_picture_is_made_smaller() -> None:
    assert face_crop(face(250, 500, 360), (500, 1000), SQUARE) == pytest.approx((0, 225, 500, 725))


def test_a_crop_reaches_beyond_a_picture_that_is_too_narrow_for_its_face() -> None:
    crop = face_crop(face(150, 400, 200), (300, 1000), (512, 128))
    assert crop == pytest.approx((-250, 290, 550, 490))


@pytest.mark.parametrize(
    ("near", "picture", "is_kept"),
    [
        (face(256, 282, 287), (512, 512), True),
        (face(500 + 24, 282 - 24, 287 + 30), (1000, 512), True),
        (face(500 + 27, 282, 287), (1000, 512), False),
        (face(256, 500 + 26 + 27, 287), (512, 1000), False),
        (face(256, 282, 287 - 40), (512, 512), False),
    ],
)
def test_a_portrait_that_is_framed_nearly_so_is_kept(near: Face, picture: Size, is_kept: bool) -> None:
    assert (face_crop(near, picture, SQUARE) is None) == is_kept


def test_a_good_picture_has_no_notice() -> None:
    framing = frame_face([face(800, 400, 90)], (1600, 900), SQUARE)
    assert (framing.num_faces, framing.notice) == (1, "")
    assert framing.face_share == pytest.approx(90 * 90 / (1600 * 900))


def test_a_picture_without_a_face_shows_its_centre_and_says_so() -> None:
    framing = frame_face([], (1600, 900), SQUARE)
    assert (framing.crop, framing.num_faces, framing.face_share) == (None, 0, 0)
    assert framing.notice.startswith("No face was found in this picture")
    assert "Send a picture of one person" in framing.notice


def test_of_several_faces_the_largest_is_taken_and_the_notice_counts_them() -> None:
    faces = [face(1200, 400, 100), face(400, 400, 90), face(700, 400, 80)]
    framing = frame_face(faces, (1600, 900), SQUARE)
    assert framing.crop == face_crop(faces[0], (1600, 900), SQUARE)
    assert framing.notice.startswith("3 faces were found in this picture, and the largest one was taken.")


def test_a_face_that_is_too_small_is_measured_and_the_needed_size_named() -> None:
    notice = frame_face([face(800, 400, 28)], (1600, 900), SQUARE).notice
    assert "28 pixels wide and is enlarged 2.6 times" in notice
    assert "at least 48 pixels wide" in notice
    assert frame_face([face(800, 400, 48)], (1600, 900), SQUARE).notice == ""


def test_a_large_face_in_a_small_picture_is_too_small_too() -> None:
    assert "36 pixels wide and is enlarged 2.0 times" in frame_face([face(32, 35, 36)], (64, 64), SQUARE).notice


@pytest.mark.parametrize(
    ("faces", "words"),
    [
        ([], "No face was found in this picture."),
        ([face(1400, 400, 150)], "No face is in the part of the picture that the video shows. Request the fit `face`"),
        ([face(1250, 400, 150)], "No face is in the part of the picture that the video shows."),  # half of it is
        ([face(1200, 400, 150)], ""),
        ([face(1400, 400, 150), face(800, 400, 120)], ""),
    ],
)
def test_a_crop_without_a_face_is_noticed(faces: list[Face], words: str) -> None:
    framing = frame_centre(faces, (1600, 900), centre_crop((1600, 900), SQUARE))
    assert framing.notice.startswith(words)
    assert bool(framing.notice) == bool(words)
    assert (framing.crop, framing.num_faces) == (None, len(faces))


@pytest.mark.parametrize(
    ("picture", "video", "shown"),
    [
        ((1600, 900), SQUARE, (350, 0, 1250, 900)),
        ((400, 900), (512, 256), (-200, 250, 600, 650)),  # black beside it
        ((1600, 400), (512, 256), (400, 0, 1200, 400)),
    ],
)
def test_the_references_fit_shows_the_centre_and_what_is_beside_it(picture: Size, video: Size, shown: Box) -> None:
    assert reference_crop(picture, video) == pytest.approx(shown)


lengths = strategies.integers(16, 4000)


@settings(max_examples=100, deadline=None)
@given(
    picture=strategies.tuples(lengths, lengths),
    video=strategies.tuples(*[strategies.integers(1, 16).map(lambda cells: 64 * cells)] * 2),
    place=strategies.tuples(strategies.floats(0, 1), strategies.floats(0, 1)),
    part=strategies.floats(0.01, 1),
)
def test_any_crop_holds_its_face_in_the_videos_shape(
    picture: Size, video: Size, place: tuple[float, float], part: float
) -> None:
    x, y = (ratio * length for ratio, length in zip(place, picture, strict=True))
    found = face(x, y, max(4.0, part * min(picture)))
    crop = face_crop(found, picture, video) or centre_crop(picture, video)
    width, height = crop[2] - crop[0], crop[3] - crop[1]
    assert width / height == pytest.approx(video[0] / video[1])
    inside, visible = clipped(crop, picture), clipped(found.box, picture)
    margins = [visible[0] - crop[0], visible[1] - crop[1], crop[2] - visible[2], crop[3] - visible[3]]
    assert min(margins) > -0.1 * found.side
    beyond = [inside[0] - crop[0], inside[1] - crop[1], crop[2] - inside[2], crop[3] - inside[3]]
    is_beyond = [max(beyond[axis], beyond[axis + 2]) > 1e-6 for axis in (0, 1)]
    assert is_beyond != [True, True]
    if any(is_beyond):  # then it is no larger than the face
        assert min(width - (visible[2] - visible[0]), height - (visible[3] - visible[1])) == pytest.approx(0, abs=1e-6)
