"""What stand-in stages make of a block: bytes of the real sizes, changed so that each picture proves its way.

    sound of a block --heard--> features, --noise--> latent --denoised, a level each--> latent --decoded--> picture

Features repeat the sound. A level takes every byte x of the latent to a x + b mod 256, with a and b of its own; such
maps do not commute, so a picture is right only if its block passed each level once and in order.
"""

import struct

import numpy as np
from numpy.typing import NDArray

from avatar.types import BLOCK_FRAMES

Bytes = NDArray[np.uint8]

RATE_HZ, FRAME_RATE_HZ = 16000, 25
# PCM16, one channel.
SOUND_BYTES = RATE_HZ * BLOCK_FRAMES // FRAME_RATE_HZ * 2
# bfloat16, as the public 14B network's at 720x400.
FEATURES_SHAPE, FEATURES_BYTES = (25, 1024, 12), 614_400
LATENT_SHAPE, LATENT_BYTES = (16, 3, 50, 90), 432_000
NUM_LEVELS = 4
PICTURE_STRIDE = 9
# A session's first frames are the decoder's start, and not shown.
FIRST_FRAME = 3
# moof(mfhd(number), traf(tfdt(time))), mdat: ISO/IEC 14496-12. Number and time are the gateway's to fill in.
MFHD = struct.pack(">I4sII", 16, b"mfhd", 0, 0)
TFDT = struct.pack(">I4sIQ", 20, b"tfdt", 1 << 24, 0)
TRAF = struct.pack(">I4s", 8 + len(TFDT), b"traf") + TFDT
MOOF = struct.pack(">I4s", 8 + len(MFHD) + len(TRAF), b"moof") + MFHD + TRAF


def heard(sound: bytes) -> bytes:
    """The features of a block's sound: the sound, over and over."""
    assert len(sound) == SOUND_BYTES
    return sound * (FEATURES_BYTES // SOUND_BYTES)


def noise(features: bytes | memoryview) -> Bytes:
    """The latent that level 0 begins with."""
    return np.frombuffer(features, np.uint8, LATENT_BYTES)


def denoised(latent: Bytes, level: int) -> Bytes:
    """The latent behind a level."""
    scale, shift = _map_of(level)
    return latent * np.uint8(scale) + np.uint8(shift)


def decoded(latent: Bytes) -> bytes:
    """The picture of a latent: every ninth byte, 48 KB."""
    return latent[::PICTURE_STRIDE].tobytes()


def fragment(picture: bytes) -> bytes:
    """A picture as a fragment of MP4, 50 KB with what stands before it."""
    return b"".join((MOOF, struct.pack(">I4s", 8 + len(picture), b"mdat"), picture))


def picture_of(data: bytes) -> bytes:
    """The picture in a fragment."""
    return data[len(MOOF) + 8 :]


def expected(sound: bytes, num_levels: int = NUM_LEVELS) -> bytes:
    """The picture of a block with this sound that passed each level once and in order."""
    scale, shift = 1, 0
    for level in range(num_levels):
        a, b = _map_of(level)
        scale, shift = scale * a % 256, (shift * a + b) % 256
    start = np.frombuffer(heard(sound), np.uint8, LATENT_BYTES)[::PICTURE_STRIDE]
    return (start * np.uint8(scale) + np.uint8(shift)).tobytes()


def shown_frames(block: int) -> int:
    """Frames of a block that are shown."""
    return BLOCK_FRAMES - (FIRST_FRAME if block == 0 else 0)


def first_frame(block: int) -> int:
    """Number of the first frame of a block that is shown."""
    return max(FIRST_FRAME, block * BLOCK_FRAMES)


def _map_of(level: int) -> tuple[int, int]:
    return 2 * level + 3, 2 * level + 1
