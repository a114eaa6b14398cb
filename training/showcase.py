"""Make README's film, its preview and a strip of frames: `python -m training.showcase models/tiny`.

The shipped portrait speaks the shipped speech, rendered in one process with the frames of the demo.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from avatar.media import read_audio, write_mp4
from avatar.render import load, render
from avatar.vae.marks.metadata import XMP
from avatar.vae.vae import HIDDEN_FRAMES

ASSETS = Path(__file__).parents[1] / "assets"
# Pictures of the strip, and frames from one to the next.
ROWS, COLUMNS, STRIDE = 2, 8, 6
# Frames are enlarged to about this height, because players show small films small or blurred.
HEIGHT = 256
# Quality of the preview, 0 to 100: a person's lips are sharp, and nine seconds take less than PREVIEW_BYTES.
QUALITY = 80
PREVIEW_BYTES = 1_000_000


def make_strip(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Arrange every STRIDEth of the first frames (f, h, w, 3) in ROWS rows of COLUMNS pictures."""
    shown = frames[::STRIDE][: ROWS * COLUMNS]
    return rearrange(shown, "(row n) h w c -> (row h) (n w) c", row=ROWS)


def enlarge(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Scale frames (f, h, w, 3) by the whole number that brings them nearest to HEIGHT without passing it."""
    scale = HEIGHT // frames.shape[1]
    if scale < 2:
        return frames
    size = (scale * frames.shape[2], scale * frames.shape[1])
    return np.stack([np.array(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in frames])


def write_preview(path: Path, frames: NDArray[np.uint8], rate_hz: int) -> None:
    """Write frames (f, h, w, 3) as a WebP animation without sound, which plays in a README and says what made it."""
    first, *others = map(Image.fromarray, frames)
    first.save(
        path,
        save_all=True,
        append_images=list(others),
        duration=1000 // rate_hz,
        loop=0,
        quality=QUALITY,
        method=4,
        xmp=XMP,
    )
    if path.stat().st_size > PREVIEW_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, at most {PREVIEW_BYTES} are wanted; lower QUALITY")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.showcase", description=(__doc__ or "").split(":")[0])
    parser.add_argument("checkpoint", type=Path, help="folder of a checkpoint")
    parser.add_argument("--speech", type=Path, default=ASSETS / "speech.wav", help="audio file")
    parser.add_argument("--portrait", type=Path, default=ASSETS / "portrait.png", help="picture of the person")
    parser.add_argument("--out", type=Path, default=ASSETS.parent / "docs", help="folder for demo.png, .webp and .mp4")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    models = load(flags.checkpoint)
    samples, rate_hz = read_audio(flags.speech)
    chunks = render(models, [torch.from_numpy(samples)], rate_hz, flags.portrait.read_bytes())
    frames = np.concatenate([chunk.frames.numpy() for chunk in tqdm(chunks, unit="chunk")])
    Image.fromarray(make_strip(frames)).save(flags.out / "demo.png", optimize=True)
    film, rate = flags.out / "demo.mp4", models.vae.config.frame_rate_hz
    enlarged = enlarge(frames)
    write_mp4(film, [enlarged], rate, HIDDEN_FRAMES, samples, rate_hz)
    write_preview(flags.out / "demo.webp", enlarged, rate)
    for each in (flags.out / f"demo.{kind}" for kind in ("png", "mp4", "webp")):
        print(f"wrote {each}, {each.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
