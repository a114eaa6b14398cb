"""What stand-in stages make of a block proves its way."""

from itertools import permutations

import numpy as np

from benchmarks.standin import content
from services.gateway.stream.fragments import renumbered

SOUND = np.random.default_rng(0).bytes(content.SOUND_BYTES)


def picture(sound: bytes, levels: list[int]) -> bytes:
    latent = content.noise(content.heard(sound))
    for level in levels:
        latent = content.denoised(latent, level)
    return content.decoded(latent)


def test_a_block_has_the_sizes_of_the_large_network() -> None:
    assert len(content.heard(SOUND)) == 614_400 == np.prod(content.FEATURES_SHAPE) * 2
    assert content.noise(content.heard(SOUND)).nbytes == 432_000 == np.prod(content.LATENT_SHAPE) * 2
    assert 48_000 <= len(content.fragment(picture(SOUND, [0, 1, 2, 3]))) <= 50_000


def test_only_every_level_once_and_in_order_gives_the_expected_picture() -> None:
    ways = [list(way) for count in range(6) for way in permutations([0, 1, 2, 3], min(count, 4))]
    ways += [[0, 1, 2, 3, 3], [0, 0, 1, 2, 3], [0, 1, 1, 2, 3]]
    right = [way for way in ways if picture(SOUND, way) == content.expected(SOUND)]
    assert all(way == [0, 1, 2, 3] for way in right)
    assert right


def test_another_sound_gives_another_picture() -> None:
    changed = b"\x01" + SOUND[1:] if SOUND[0] != 1 else b"\x02" + SOUND[1:]
    assert content.expected(changed) != content.expected(SOUND)


def test_the_gateway_can_renumber_a_fragment_and_leaves_its_picture() -> None:
    made = renumbered(content.fragment(picture(SOUND, [0, 1, 2, 3])), 15)
    assert made != content.fragment(picture(SOUND, [0, 1, 2, 3]))
    assert content.picture_of(made) == content.expected(SOUND)


def test_frames_of_blocks_follow_each_other() -> None:
    assert content.first_frame(0) == content.FIRST_FRAME
    for block in range(3):
        assert content.first_frame(block) + content.shown_frames(block) == content.first_frame(block + 1)
