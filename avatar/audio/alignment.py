"""Where samples, encoder frames, pixel frames and blocks lie, in integers.

Sound has 16000 samples/s, the encoder 50 frames/s: frame j begins at sample 320 j. Block k covers samples
7680 k .. 7680 k + 7679, encoder frames 24 k .. 24 k + 23 and pixel frames 12 k .. 12 k + 11. No position is ever
computed from seconds: int(k * 0.48 * 16000) is one sample short at k = 7, and all features of its window would be off.
"""

from avatar.types import BLOCK_FRAMES

SAMPLE_RATE_HZ = 16000
MIN_RATE_HZ = 8000
MAX_RATE_HZ = 48000

FRAME_SAMPLES = 320
RECEPTIVE_SAMPLES = 400  # what one encoder frame hears, counted from its beginning
BLOCK_ENCODER_FRAMES = 24
BLOCK_SAMPLES = BLOCK_ENCODER_FRAMES * FRAME_SAMPLES


def window_end(index: int, right_frames: int) -> int:
    """The number of samples that must have been heard before a block can be encoded.

    They reach to the end of what the block's last encoder frame hears, and right_frames further.
    """
    return (index + 1) * BLOCK_SAMPLES + (RECEPTIVE_SAMPLES - FRAME_SAMPLES) + right_frames * FRAME_SAMPLES


def placement(index: int) -> tuple[list[int], list[float]]:
    """For each pixel frame of a block, the encoder frame f before it and the weight in [0, 1) of frame f + 1.

    Pixel frame n (25/s) takes point i = round(1.2 n) of a grid of 30 points/s, which lies at encoder frame 5 i / 3.
    All frames used are within 24 k - 1 .. 24 k + 23. Source: the limit for long files of the rule that Wan2.2-S2V
    applies to whole files (`offline.py`), which stretches time by up to 27 ms at a file's end.
    """
    first = index * BLOCK_FRAMES
    grid = [(12 * n + 5) // 10 for n in range(first, first + BLOCK_FRAMES)]
    return [5 * i // 3 for i in grid], [5 * i % 3 / 3 for i in grid]
