from dataclasses import replace

import numpy as np
import pytest

from training.synthetic.photo import Photo, photo_of

SIZE = 64
PLAIN = Photo(np.tile(np.arange(256, dtype=np.uint8)[:, None], 3), 0.0, 0.0, None, None, 0)


def picture() -> np.ndarray:
    rows, columns = np.mgrid[0:SIZE, 0:SIZE]
    return np.stack([2 * rows, 2 * columns, 60 + rows + columns], 2).astype(np.uint8)


def test_a_plain_photo_is_the_picture() -> None:
    np.testing.assert_array_equal(PLAIN.develop(picture(), 0), picture())


def test_noise_changes_from_frame_to_frame_and_the_rest_does_not() -> None:
    noise = np.random.default_rng(0).normal(0, 2, (80, 80, 3)).astype(np.float32)
    noisy = replace(PLAIN, noise=noise)
    one, same, two = (noisy.develop(picture(), frame).astype(int) for frame in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one - two).std() == pytest.approx(2 * np.sqrt(2), rel=0.2)
    still = replace(PLAIN, blur=0.6, corners=0.3, quality=80)
    np.testing.assert_array_equal(still.develop(picture(), 0), still.develop(picture(), 1))


def test_pictures_to_compare_with_have_no_noise() -> None:
    for seed in range(30):
        photo = photo_of(np.random.default_rng(seed), SIZE, seed, has_noise=False)
        np.testing.assert_array_equal(photo.develop(picture(), 0), photo.develop(picture(), 1))


def test_effects_depend_on_their_seed_alone_and_leave_pictures_recognisable() -> None:
    changes = []
    for seed in range(30):
        one, two = (photo_of(np.random.default_rng(seed), SIZE, seed).develop(picture(), 3) for _ in range(2))
        np.testing.assert_array_equal(one, two)
        assert one.shape == picture().shape
        changes.append(np.abs(one.astype(int) - picture()).mean())
    assert max(changes) < 45
    assert np.mean(np.array(changes) > 1) > 0.5
