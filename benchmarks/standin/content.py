"""Contents of a block at the stand-in stages: bytes of the real sizes, changed so that each picture proves its path.

    audio --features_of--> features --initial_latent--> latent --denoise (each level)--> latent --decode--> picture

Features repeat the audio. A level maps every byte x of the latent to a x + b mod 256, with its own a and b. Such maps
do not commute, so a picture is correct only if its block passed each level once and in order.
"""

import struct

import numpy as np
from numpy.typing import NDArray

from avatar.types import BLOCK_FRAMES

Bytes = NDArray[np.uint8]

RATE_HZ, FRAME_RATE_HZ = 16000, 25
# bfloat16, as in the public 14B network at 720x400.
FEATURES_SHAPE, FEATURES_BYTES = (25, 1024, 12), 614_400
LATENT_SHAPE, LATENT_BYTES = (16, 3, 50, 90), 432_000
NUM_LEVELS = 4
PICTURE_STRIDE = 9
# Of raw frames, in pixels.
SIDE = 64
RGB_BYTES = SIDE * SIDE * 3
# The decoder consumes a session's first three frames to start.
FIRST_FRAME = 3
# moof(mfhd(number), traf(tfdt(time))), mdat: ISO/IEC 14496-12. The gateway fills in number and time.
MFHD = struct.pack(">I4sII", 16, b"mfhd", 0, 0)
TFDT = struct.pack(">I4sIQ", 20, b"tfdt", 1 << 24, 0)
TRAF = struct.pack(">I4s", 8 + len(TFDT), b"traf") + TFDT
MOOF = struct.pack(">I4s", 8 + len(MFHD) + len(TRAF), b"moof") + MFHD + TRAF


def block_bytes(rate_hz: int) -> int:
    """Return the size of a block's audio: PCM16, one channel."""
    return rate_hz * BLOCK_FRAMES // FRAME_RATE_HZ * 2


BLOCK_BYTES = block_bytes(RATE_HZ)


def features_of(audio: bytes) -> bytes:
    """Return the features of a block's audio: the audio, repeated."""
    return (audio * -(-FEATURES_BYTES // len(audio)))[:FEATURES_BYTES]


def initial_latent(features: bytes | memoryview) -> Bytes:
    """Return the latent that level 0 starts from."""
    return np.frombuffer(features, np.uint8, LATENT_BYTES)


def denoise(latent: Bytes, level: int) -> Bytes:
    """Return the latent after a level."""
    scale, shift = _map_of(level)
    return latent * np.uint8(scale) + np.uint8(shift)


def decode(latent: Bytes) -> bytes:
    """Return the picture of a latent: every ninth byte, 48 KB."""
    return latent[::PICTURE_STRIDE].tobytes()


def decode_rgb(latent: Bytes, num_frames: int) -> list[bytes]:
    """Return the latent's bytes as raw frames of SIDE x SIDE pixels, 12 KB each."""
    return [latent[number * RGB_BYTES : (number + 1) * RGB_BYTES].tobytes() for number in range(num_frames)]


def fragment_of(picture: bytes) -> bytes:
    """Return a picture as a fragment of MP4, 50 KB with its headers."""
    return b"".join((MOOF, struct.pack(">I4s", 8 + len(picture), b"mdat"), picture))


def picture_in(fragment: bytes) -> bytes:
    """Return the picture in a fragment."""
    return fragment[len(MOOF) + 8 :]


def expected_picture(audio: bytes, num_levels: int = NUM_LEVELS) -> bytes:
    """Return the picture of a block with this audio that passed each level once and in order."""
    scale, shift = 1, 0
    for level in range(num_levels):
        a, b = _map_of(level)
        scale, shift = scale * a % 256, (shift * a + b) % 256
    start = np.frombuffer(features_of(audio), np.uint8, LATENT_BYTES)[::PICTURE_STRIDE]
    return (start * np.uint8(scale) + np.uint8(shift)).tobytes()


def num_frames(block: int) -> int:
    """Return how many frames of a block are shown."""
    return BLOCK_FRAMES - (FIRST_FRAME if block == 0 else 0)


def first_frame(block: int) -> int:
    """Return the number of a block's first shown frame."""
    return max(FIRST_FRAME, block * BLOCK_FRAMES)


def _map_of(level: int) -> tuple[int, int]:
    return 2 * level + 3, 2 * level + 1
