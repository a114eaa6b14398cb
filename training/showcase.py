"""Make README's film and strip of frames: `python -m training.showcase models/tiny`.

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
from avatar.vae.vae import HIDDEN_FRAMES

ASSETS = Path(__file__).parents[1] / "assets"
# Pictures of the strip, and frames from one to the next.
ROWS, COLUMNS, STRIDE = 2, 8, 6
# The film is enlarged, because players show 128 pixels small or blurred.
SCALE = 2


def make_strip(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Arrange every STRIDEth of the first frames (f, h, w, 3) in ROWS rows of COLUMNS pictures."""
    shown = frames[::STRIDE][: ROWS * COLUMNS]
    return rearrange(shown, "(row n) h w c -> (row h) (n w) c", row=ROWS)


def enlarge(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Scale frames to SCALE times the height and width."""
    size = (SCALE * frames.shape[2], SCALE * frames.shape[1])
    return np.stack([np.array(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in frames])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.showcase", description=(__doc__ or "").split(":")[0])
    parser.add_argument("checkpoint", type=Path, help="folder of a checkpoint")
    parser.add_argument("--speech", type=Path, default=ASSETS / "speech.wav", help="audio file")
    parser.add_argument("--portrait", type=Path, default=ASSETS / "portrait.png", help="picture of the person")
    parser.add_argument("--out", type=Path, default=ASSETS.parent / "docs", help="folder for demo.png and demo.mp4")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    models = load(flags.checkpoint)
    samples, rate_hz = read_audio(flags.speech)
    chunks = render(models, [torch.from_numpy(samples)], rate_hz, flags.portrait.read_bytes())
    frames = np.concatenate([chunk.frames.numpy() for chunk in tqdm(chunks, unit="chunk")])
    Image.fromarray(make_strip(frames)).save(flags.out / "demo.png", optimize=True)
    film, rate = flags.out / "demo.mp4", models.vae.config.frame_rate_hz
    write_mp4(film, [enlarge(frames)], rate, HIDDEN_FRAMES, samples, rate_hz)
    print(f"wrote {flags.out / 'demo.png'} and {film}, {film.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
