import numpy as np

from training.showcase import COLUMNS, ROWS, SCALE, STRIDE, enlarge, make_strip


def test_a_strip_continues_in_its_second_row() -> None:
    frames = np.arange(200, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 6, 3), np.uint8)
    strip = make_strip(frames)
    assert strip.shape == (4 * ROWS, 6 * COLUMNS, 3)
    assert (strip[0, 6, 0], strip[4, 0, 0]) == (STRIDE, STRIDE * COLUMNS)


def test_enlarged_frames_keep_their_brightness() -> None:
    frames = np.full((2, 8, 8, 3), 77, np.uint8)
    assert enlarge(frames).shape == (2, 8 * SCALE, 8 * SCALE, 3)
    assert (enlarge(frames) == 77).all()
