"""The cost of encoding the frames of a block, and their encoded size."""

import time
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from avatar.vae.encodings import ENCODINGS, encode
from benchmarks.row import Row, row
from benchmarks.standin.content import PUBLIC

NUM_BLOCKS, FRAME_RATE_HZ = 15, 25
SIDE = 256
PORTRAIT = Path(__file__).parents[1] / "assets" / "portrait.png"


def rows() -> list[Row]:
    """Measure CPU time per frame and bitrate of a swaying portrait; the encodings take turns."""
    rng = np.random.default_rng(0)
    face = np.asarray(Image.open(PORTRAIT).convert("RGB").resize((SIDE, SIDE)))
    times_ms: dict[str, list[float]] = {name: [] for name in ENCODINGS}
    num_bytes = dict.fromkeys(ENCODINGS, 0)
    for _ in range(NUM_BLOCKS):
        sway = np.cumsum(rng.integers(-1, 2, PUBLIC.block_frames))
        frames = np.stack([np.roll(face, pixels, axis=1) for pixels in sway])
        for name in ENCODINGS:
            started = time.thread_time()
            encoded = encode(frames, name, FRAME_RATE_HZ)
            times_ms[name].append((time.thread_time() - started) * 1000 / PUBLIC.block_frames)
            num_bytes[name] += sum(len(each.data) for each in encoded)
    seconds = NUM_BLOCKS * PUBLIC.block_frames / FRAME_RATE_HZ
    return [
        each
        for name in ENCODINGS
        for each in (
            row(f"encoding a frame, {name}", median(times_ms[name]), "ms"),
            row(f"bytes of {name}", num_bytes[name] / seconds / 1000, "kB/s"),
        )
    ]
