"""The contents of stand-in stages prove the path of a block."""

from itertools import permutations

import numpy as np

from benchmarks.standin import content
from benchmarks.standin.content import PUBLIC
from services.gateway.stream.fragments import renumber_fragment

AUDIO = np.random.default_rng(0).bytes(PUBLIC.block_bytes())


def picture(audio: bytes, levels: list[int]) -> bytes:
    latent = PUBLIC.initial_latent(PUBLIC.features_of(audio))
    for level in levels:
        latent = content.denoise(latent, level)
    return content.decode(latent)


def test_a_block_has_the_sizes_of_the_large_network() -> None:
    assert len(PUBLIC.features_of(AUDIO)) == 614_400 == np.prod(PUBLIC.features_shape) * 2
    assert PUBLIC.initial_latent(PUBLIC.features_of(AUDIO)).nbytes == 432_000 == np.prod(PUBLIC.latent_shape) * 2
    assert 48_000 <= len(content.fragment_of(picture(AUDIO, [0, 1, 2, 3]))) <= 50_000


def test_only_every_level_once_and_in_order_gives_the_expected_picture() -> None:
    paths = [list(path) for count in range(6) for path in permutations([0, 1, 2, 3], min(count, 4))]
    paths += [[0, 1, 2, 3, 3], [0, 0, 1, 2, 3], [0, 1, 1, 2, 3]]
    correct = [path for path in paths if picture(AUDIO, path) == PUBLIC.expected_picture(AUDIO)]
    assert all(path == [0, 1, 2, 3] for path in correct)
    assert correct


def test_different_audio_gives_a_different_picture() -> None:
    changed = b"\x01" + AUDIO[1:] if AUDIO[0] != 1 else b"\x02" + AUDIO[1:]
    assert PUBLIC.expected_picture(changed) != PUBLIC.expected_picture(AUDIO)


def test_the_gateway_renumbers_a_fragment_without_changing_its_picture() -> None:
    fragment = content.fragment_of(picture(AUDIO, [0, 1, 2, 3]))
    changed = renumber_fragment(fragment, 15)
    assert changed != fragment
    assert content.picture_in(changed) == PUBLIC.expected_picture(AUDIO)


def test_frames_of_consecutive_blocks_are_contiguous() -> None:
    assert PUBLIC.first_frame(0) == content.FIRST_FRAME
    for block in range(3):
        assert PUBLIC.first_frame(block) + PUBLIC.num_frames(block) == PUBLIC.first_frame(block + 1)
