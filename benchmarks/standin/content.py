"""Contents of a block at the stand-in stages: bytes of the real sizes, changed so that each picture proves its path.

    audio --features_of--> features --initial_latent--> latent --denoise (each level)--> latent --decode--> picture

Features repeat the audio. A level maps every byte x of the latent to a x + b mod 256, with its own a and b. Such maps
do not commute, so a picture is correct only if its block passed each level once and in order.
"""

import struct
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from avatar.types import BLOCK_LATENTS, FRAMES_PER_LATENT

Bytes = NDArray[np.uint8]

RATE_HZ, FRAME_RATE_HZ = 16000, 25
NUM_LEVELS = 4
PICTURE_STRIDE = 9
# Of raw frames, in pixels.
SIDE = 64
RGB_BYTES = SIDE * SIDE * 3
# The decoder consumes a session's first three frames to start.
FIRST_FRAME = FRAMES_PER_LATENT - 1
# moof(mfhd(number), traf(tfdt(time))), mdat: ISO/IEC 14496-12. The gateway fills in number and time.
MFHD = struct.pack(">I4sII", 16, b"mfhd", 0, 0)
TFDT = struct.pack(">I4sIQ", 20, b"tfdt", 1 << 24, 0)
TRAF = struct.pack(">I4s", 8 + len(TFDT), b"traf") + TFDT
MOOF = struct.pack(">I4s", 8 + len(MFHD) + len(TRAF), b"moof") + MFHD + TRAF


@dataclass(frozen=True)
class Content:
    """Sizes of a block's messages, as in the public 14B network at 720x400 in bfloat16.

    block_latents: latent frames of a block. num_levels: of the schedule. inputs: those of the network beside features.
    """

    block_latents: int = BLOCK_LATENTS
    num_levels: int = NUM_LEVELS
    inputs: tuple[str, ...] = ()

    @property
    def block_frames(self) -> int:
        """Pixel frames of a block."""
        return FRAMES_PER_LATENT * self.block_latents

    @property
    def block_s(self) -> float:
        """Duration of a block, in seconds."""
        return self.block_frames / FRAME_RATE_HZ

    @property
    def features_shape(self) -> tuple[int, int, int]:
        return 25, 1024, self.block_frames

    @cached_property
    def features_bytes(self) -> int:
        return int(np.prod(self.features_shape)) * 2

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        return 16, self.block_latents, 50, 90

    @cached_property
    def latent_bytes(self) -> int:
        return int(np.prod(self.latent_shape)) * 2

    def block_bytes(self, rate_hz: int = RATE_HZ) -> int:
        """Return the size of a block's audio: PCM16, one channel."""
        return rate_hz * self.block_frames // FRAME_RATE_HZ * 2

    def features_of(self, audio: bytes) -> bytes:
        """Return the features of a block's audio: the audio, repeated."""
        return (audio * -(-self.features_bytes // len(audio)))[: self.features_bytes]

    def initial_latent(self, features: bytes | memoryview) -> Bytes:
        """Return the latent that level 0 starts from."""
        return np.frombuffer(features, np.uint8, self.latent_bytes)

    def expected_picture(self, audio: bytes) -> bytes:
        """Return the picture of a block with this audio that passed each level once and in order."""
        scale, shift = 1, 0
        for level in range(self.num_levels):
            a, b = _map_of(level)
            scale, shift = scale * a % 256, (shift * a + b) % 256
        start = self.initial_latent(self.features_of(audio))[::PICTURE_STRIDE]
        return (start * np.uint8(scale) + np.uint8(shift)).tobytes()

    def num_frames(self, block: int) -> int:
        """Return how many frames of a block are shown."""
        return self.block_frames - (FIRST_FRAME if block == 0 else 0)

    def first_frame(self, block: int) -> int:
        """Return the number of a block's first shown frame."""
        return max(FIRST_FRAME, block * self.block_frames)


# The public network's blocks and levels.
PUBLIC = Content()
# Blocks of one latent frame, and the levels that are meant for them.
SHORT = Content(block_latents=1, num_levels=2)


def denoise(latent: Bytes, level: int) -> Bytes:
    """Return the latent after a level."""
    scale, shift = _map_of(level)
    return latent * np.uint8(scale) + np.uint8(shift)


def decode(latent: Bytes) -> bytes:
    """Return the picture of a latent: every ninth byte, 16 KB a latent frame."""
    return latent[::PICTURE_STRIDE].tobytes()


def decode_rgb(latent: Bytes, num_frames: int) -> list[bytes]:
    """Return the latent's bytes as raw frames of SIDE x SIDE pixels, 12 KB each."""
    return [latent[number * RGB_BYTES : (number + 1) * RGB_BYTES].tobytes() for number in range(num_frames)]


def fragment_of(picture: bytes) -> bytes:
    """Return a picture as a fragment of MP4."""
    return b"".join((MOOF, struct.pack(">I4s", 8 + len(picture), b"mdat"), picture))


def picture_in(fragment: bytes) -> bytes:
    """Return the picture in a fragment."""
    return fragment[len(MOOF) + 8 :]


def _map_of(level: int) -> tuple[int, int]:
    return 2 * level + 3, 2 * level + 1
