"""Tests of avatar.vae.marks.metadata: marks for machines, read with other people's tools."""

import io

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from avatar.vae.encodings import ENCODINGS, encode, init_segment
from avatar.vae.marks.metadata import MARKS_OF
from tests.conftest import ASSETS
from tests.readers import GENERATED, mark_of_jpeg, marks_of_film

RATE_HZ = 25


def portrait(height: int, width: int, num_frames: int = 12) -> NDArray[np.uint8]:
    image = np.asarray(Image.open(ASSETS / "portrait.png").convert("RGB").resize((width, height)))
    return np.stack([np.roll(image, number // 2, axis=1) for number in range(num_frames)])


def streamed(frames: NDArray[np.uint8], encoding: str, *, is_marked: bool) -> list[bytes]:
    """Encode two groups of frames."""
    groups = [encode(frames, encoding, RATE_HZ, first_frame=first, is_marked=is_marked) for first in (0, len(frames))]
    return [each.data for group in groups for each in group]


def found_in(encoding: str, *, is_marked: bool) -> tuple[str | None, list[str | None]]:
    """Return the source types that are found in the files' metadata, and in each key frame of H.264."""
    data = streamed(portrait(64, 96), encoding, is_marked=is_marked)
    if encoding == "jpeg":
        marks = {mark_of_jpeg(each) for each in data}
        return marks.pop() if len(marks) == 1 else None, []
    init = init_segment(encoding, 64, 96, RATE_HZ, is_marked=is_marked)
    return marks_of_film(init + b"".join(data), {"h264": "h264", "fmp4": "mp4"}[encoding])


@pytest.mark.parametrize("encoding", [name for name in ENCODINGS if name != "rgb24"])
def test_other_peoples_tools_find_the_marks(encoding: str) -> None:
    metadata, key_frames = found_in(encoding, is_marked=True)
    assert metadata == (GENERATED if "xmp" in MARKS_OF[encoding] else None)
    assert key_frames == ([GENERATED] * 2 if "sei" in MARKS_OF[encoding] else [])
    assert MARKS_OF[encoding]


@pytest.mark.parametrize("encoding", [name for name in ENCODINGS if name != "rgb24"])
def test_without_marks_there_are_none(encoding: str) -> None:
    metadata, key_frames = found_in(encoding, is_marked=False)
    assert metadata is None
    assert set(key_frames) <= {None}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_marks_change_no_pixel(encoding: str) -> None:
    frames = portrait(64, 96)
    pixels = [pixels_of(streamed(frames, encoding, is_marked=marked), encoding, marked) for marked in (True, False)]
    assert len(pixels[0]) == 24
    assert pixels[0] == pixels[1]


def pixels_of(data: list[bytes], encoding: str, is_marked: bool) -> list[bytes]:
    if encoding == "rgb24":
        return data
    if encoding == "jpeg":
        return [Image.open(io.BytesIO(each)).tobytes() for each in data]
    init = init_segment(encoding, 64, 96, RATE_HZ, is_marked=is_marked)
    kind = {"h264": "h264", "fmp4": "mp4"}[encoding]
    with av.open(io.BytesIO(init + b"".join(data)), "r", format=kind) as film:
        return [frame.to_ndarray(format="rgb24").tobytes() for frame in film.decode(video=0)]


def test_marks_of_h264_take_no_bytes() -> None:
    """The message replaces the encoder's own, which is longer."""
    frames = portrait(64, 96)
    for encoding in ("h264", "fmp4"):
        marked, plain = (streamed(frames, encoding, is_marked=is_marked) for is_marked in (True, False))
        assert sum(map(len, marked)) <= sum(map(len, plain))
