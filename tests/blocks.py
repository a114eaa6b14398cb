"""The length of the blocks of the tests' checkpoint: 3 latents, or as many as TEST_BLOCK_LATENTS says.

`tests/contract/test_short_blocks.py` runs the contract's tests with blocks of one.
"""

import os

from avatar.types import FRAMES_PER_LATENT

BLOCK_LATENTS = int(os.environ.get("TEST_BLOCK_LATENTS", "3"))
BLOCK_FRAMES = FRAMES_PER_LATENT * BLOCK_LATENTS
BLOCK_S = BLOCK_FRAMES / 25
FIRST_FRAME = FRAMES_PER_LATENT - 1


def whole_blocks(seconds: float) -> int:
    """Return the blocks that so much speech fills, the last one with silence."""
    return -(-round(seconds * 25) // BLOCK_FRAMES)


def end_frame(seconds: float) -> int:
    """Return the number of the frame after the last of so much speech."""
    return whole_blocks(seconds) * BLOCK_FRAMES
