"""Tests of avatar.vae.marks.label."""

import io

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from avatar.vae.encodings import encode
from avatar.vae.marks.label import draw_label
from tests.vae.marks.test_metadata import RATE_HZ, portrait

SIZES = [(64, 64), (128, 128), (384, 704), (704, 384), (704, 704)]


def labelled(height: int, width: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return frames with the label, and the pixels (h, w) that it changed in frames of every colour."""
    grey = np.full((1, height, width, 3), 127, np.uint8)
    draw_label(grey)
    frames = portrait(height, width, num_frames=4)
    draw_label(frames)
    return frames, (grey[0] != 127).all(axis=-1)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_label_is_a_readable_box_in_the_corner(height: int, width: int) -> None:
    frames, box = labelled(height, width)
    rows, columns = np.flatnonzero(box.any(axis=1)), np.flatnonzero(box.any(axis=0))
    side = min(height, width)
    assert rows[-1] < side / 3
    assert columns[-1] < side / 3
    assert box.mean() < 0.08
    shown = frames[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].mean(axis=-1)
    assert (shown == shown[:1]).all(), "the same in every frame"
    letters = shown[0] > 127
    heights = np.flatnonzero(letters.any(axis=1))
    # Two letters, in front of a border.
    assert heights[-1] - heights[0] + 1 >= max(7, side / 14)
    assert 0.1 < letters.mean() < 0.5
    assert not letters[[0, -1]].any()
    assert np.count_nonzero(np.diff(letters.any(axis=0).astype(int)) == 1) == 2


@pytest.mark.parametrize(("height", "width"), SIZES[:3])
def test_the_label_covers_nothing_else(height: int, width: int) -> None:
    frames, box = labelled(height, width)
    rows, columns = np.flatnonzero(box.any(axis=1)), np.flatnonzero(box.any(axis=0))
    truth = portrait(height, width, num_frames=4)
    outside = np.ones((height, width), bool)
    outside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = False
    np.testing.assert_array_equal(frames[:, outside], truth[:, outside])


@pytest.mark.parametrize("encoding", ["jpeg", "h264"])
@pytest.mark.parametrize(("height", "width"), [(128, 128), (704, 384)])
def test_the_label_survives_encoding(encoding: str, height: int, width: int) -> None:
    frames, box = labelled(height, width)
    rows, columns = np.flatnonzero(box.any(axis=1)), np.flatnonzero(box.any(axis=0))
    part = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    data = [each.data for each in encode(frames, encoding, RATE_HZ, quality=30)]
    if encoding == "jpeg":
        shown = np.asarray(Image.open(io.BytesIO(data[-1])))
    else:
        with av.open(io.BytesIO(b"".join(data)), "r", format="h264") as film:
            shown = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)][-1]
    drawn, read = frames[3][part].mean(axis=-1), shown[part].mean(axis=-1)
    assert np.corrcoef(drawn.ravel(), read.ravel())[0, 1] > 0.95
