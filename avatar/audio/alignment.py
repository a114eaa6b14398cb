"""Positions of samples, encoder frames, pixel frames and blocks, in integers.

Audio has 16000 samples/s, the encoder 50 frames/s: frame j starts at sample 320 j. Block k covers samples
7680 k .. 7680 k + 7679, encoder frames 24 k .. 24 k + 23 and pixel frames 12 k .. 12 k + 11. No position is ever
computed from seconds: int(k * 0.48 * 16000) is one sample short at k = 7, which would misalign its whole window.
"""

from avatar.types import BLOCK_FRAMES

SAMPLE_RATE_HZ = 16000
MIN_RATE_HZ = 8000
MAX_RATE_HZ = 48000

FRAME_SAMPLES = 320  # from one encoder frame to the next
RECEPTIVE_FIELD_SAMPLES = 400  # what one encoder frame covers, from its first sample
BLOCK_ENCODER_FRAMES = 24
BLOCK_SAMPLES = BLOCK_ENCODER_FRAMES * FRAME_SAMPLES


def window_end(index: int, right_frames: int) -> int:
    """Return the sample at which block `index`'s window ends (exclusive): the block needs all samples before it.

    The window covers the receptive field of the block's last encoder frame and right_frames encoder frames after it.
    """
    return (index + 1) * BLOCK_SAMPLES + (RECEPTIVE_FIELD_SAMPLES - FRAME_SAMPLES) + right_frames * FRAME_SAMPLES


def frame_weights(index: int) -> tuple[list[int], list[float]]:
    """Return where the pixel frames of block `index` lie between encoder frames.

    For each of the 12 pixel frames: the encoder frame j before it, counted from the stream's start, and the weight in
    [0, 1) of frame j + 1. Pixel frame n (25/s) takes point i = round(1.2 n) of a grid of 30 points/s, which lies at
    encoder frame 5 i / 3. All frames used are within 24 k - 1 .. 24 k + 23.
    Source: the limit for long files of the rule that Wan2.2-S2V applies to whole files (`whole_file.py`), which
    stretches time by up to 27 ms at a file's end.
    """
    first = index * BLOCK_FRAMES
    grid = [(12 * n + 5) // 10 for n in range(first, first + BLOCK_FRAMES)]
    return [5 * i // 3 for i in grid], [5 * i % 3 / 3 for i in grid]
