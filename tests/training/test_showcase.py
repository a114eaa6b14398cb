import numpy as np

from training.showcase import COLUMNS, ROWS, SCALE, STRIDE, enlarged, strip


def test_a_strip_goes_on_in_its_second_row() -> None:
    frames = np.arange(200, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 6, 3), np.uint8)
    shown = strip(frames)
    assert shown.shape == (4 * ROWS, 6 * COLUMNS, 3)
    assert (shown[0, 6, 0], shown[4, 0, 0]) == (STRIDE, STRIDE * COLUMNS)


def test_a_film_s_frames_are_larger_and_as_bright() -> None:
    frames = np.full((2, 8, 8, 3), 77, np.uint8)
    assert enlarged(frames).shape == (2, 8 * SCALE, 8 * SCALE, 3)
    assert (enlarged(frames) == 77).all()
