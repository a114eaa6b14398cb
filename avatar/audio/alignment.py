"""Positions of samples, encoder frames, pixel frames and blocks, in integers.

Audio has 16000 samples/s, the encoder 50 frames/s, video 25: encoder frame j starts at sample 320 j, pixel frame n at
encoder frame 2 n. Block k of f pixel frames covers samples 640 f k .. 640 f (k + 1) - 1 and encoder frames
2 f k .. 2 f (k + 1) - 1. No position is ever computed from seconds: int(k * 0.48 * 16000) is one sample short at k = 7,
which would misalign its whole window.
"""

from dataclasses import dataclass

from avatar.types import FRAME_RATE_HZ, FRAMES_PER_LATENT

SAMPLE_RATE_HZ = 16000
MIN_RATE_HZ = 8000
MAX_RATE_HZ = 48000

ENCODER_HZ = 50
FRAME_SAMPLES = SAMPLE_RATE_HZ // ENCODER_HZ  # from one encoder frame to the next
RECEPTIVE_FIELD_SAMPLES = 400  # what one encoder frame covers, from its first sample


@dataclass(frozen=True)
class BlockGrid:
    """The positions of a stream's blocks.

    latents: latent frames of a block.
    """

    latents: int

    @property
    def frames(self) -> int:
        """Pixel frames of a block."""
        return FRAMES_PER_LATENT * self.latents

    @property
    def duration_s(self) -> float:
        """Duration of a block, in seconds."""
        return self.frames / FRAME_RATE_HZ

    @property
    def encoder_frames(self) -> int:
        """Encoder frames of a block."""
        return self.frames * ENCODER_HZ // FRAME_RATE_HZ

    @property
    def samples(self) -> int:
        """Samples of a block, at 16 kHz."""
        return self.encoder_frames * FRAME_SAMPLES

    def num_blocks(self, num_samples: int, rate_hz: int) -> int:
        """Return how many blocks hold so many samples at a rate; the last one may be partly empty."""
        return -(-num_samples * SAMPLE_RATE_HZ // (rate_hz * self.samples))

    def window_end(self, index: int, right_frames: int) -> int:
        """Return the sample at which block `index`'s window ends (exclusive): the block needs all samples before it.

        The window covers the receptive field of the block's last encoder frame and right_frames encoder frames after
        it.
        """
        overlap = RECEPTIVE_FIELD_SAMPLES - FRAME_SAMPLES
        return (index + 1) * self.samples + overlap + right_frames * FRAME_SAMPLES

    def frame_weights(self, index: int) -> tuple[list[int], list[float]]:
        """Return where the pixel frames of block `index` lie between encoder frames.

        For each pixel frame: the encoder frame j before it, counted from the stream's start, and the weight in [0, 1)
        of frame j + 1. Pixel frame n (25/s) takes point i = round(1.2 n) of a grid of 30 points/s, which lies at
        encoder frame 5 i / 3. All frames used are the block's own and the one before them.
        Source: the limit for long files of the rule that Wan2.2-S2V applies to whole files (`whole_file.py`), which
        stretches time by up to 27 ms at a file's end.
        """
        first = index * self.frames
        grid = [(12 * n + 5) // 10 for n in range(first, first + self.frames)]
        return [5 * i // 3 for i in grid], [5 * i % 3 / 3 for i in grid]
