"""Make README's films, a preview and a strip of frames: `python -m training.showcase models/tiny`.

demo: the shipped portrait speaks the shipped speech, as in `make demo`, as a film, a WebP animation and a strip of
frames. people: the six other portraits speak it in turns, and each listens to the others.

Axes: f frames, s samples, h w height and width of frames.
"""

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from avatar.media import read_audio, write_mp4
from avatar.vae.marks.metadata import XMP
from avatar.vae.vae import HIDDEN_FRAMES
from training.data import AUDIO_RATE_HZ
from training.eval.inference import Audio, Models, Pixels, load, render_frames

ASSETS = Path(__file__).parents[1] / "assets"
PORTRAITS = sorted((ASSETS / "portraits").glob("*.png"))
# Pictures of the strip, and frames from one to the next.
ROWS, COLUMNS, STRIDE = 2, 8, 6
STRIP_HEIGHT = 160
# Quality of the preview, 0 to 100: a person's lips are sharp, and nine seconds take less than PREVIEW_BYTES.
QUALITY = 80
PREVIEW_BYTES = 1_000_000
# People in a row of the film.
ROW = 3
# Spoken twice, the speech is long enough for six turns. Least length of a turn, and that of the windows of a pause.
REPEATS, LEAST_TURN_S, PAUSE_S = 2, 1.2, 0.2


def make_strip(frames: Pixels) -> Pixels:
    """Arrange every STRIDEth of the first frames (f, h, w, 3) in ROWS rows of COLUMNS pictures."""
    shown = shrink(frames[::STRIDE][: ROWS * COLUMNS], STRIP_HEIGHT)
    return rearrange(shown, "(row n) h w c -> (row h) (n w) c", row=ROWS)


def shrink(frames: Pixels, height: int) -> Pixels:
    """Scale frames (f, h, w, 3) that are higher than a height to it."""
    if frames.shape[1] <= height:
        return frames
    size = (round(height / frames.shape[1] * frames.shape[2]), height)
    return np.stack([np.array(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)) for frame in frames])


def cut_into_turns(samples: Audio, num_turns: int) -> list[slice]:
    """Cut speech (s,) at its quietest moments, at least LEAST_TURN_S apart. ValueError if it is too short."""
    window = round(PAUSE_S * AUDIO_RATE_HZ)
    loudness = np.convolve(samples.astype(np.float64) ** 2, np.ones(window) / window, "same")
    cuts = [0, len(samples)]
    for index in np.argsort(loudness, kind="stable"):
        if len(cuts) > num_turns:
            break
        if min(abs(index - cut) for cut in cuts) >= LEAST_TURN_S * AUDIO_RATE_HZ:
            cuts.append(int(index))
    if len(cuts) <= num_turns:
        raise ValueError(f"{len(samples) / AUDIO_RATE_HZ:.1f} s of speech are too short for {num_turns} turns")
    cuts.sort()
    return [slice(*pair) for pair in pairwise(cuts)]


def render_people(models: Models, references: Sequence[Pixels], samples: Audio) -> Pixels:
    """Return frames (f, h, w, 3) of people who speak in turns and listen to each other, in rows of ROW."""
    rendered = []
    turns = cut_into_turns(samples, len(references))
    for seed, (reference, turn) in enumerate(tqdm(list(zip(references, turns, strict=True)), unit="person")):
        own, other = np.zeros_like(samples), samples.copy()
        own[turn], other[turn] = samples[turn], 0
        rendered.append(render_frames(models, reference, own, other=other, seed=seed))
    return rearrange(np.stack(rendered), "(row n) f h w c -> f (row h) (n w) c", n=ROW)


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
    parser.add_argument("--out", type=Path, default=ASSETS.parent / "docs", help="folder for the films and pictures")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    models, rate_hz = load(flags.checkpoint), AUDIO_RATE_HZ
    speech, _ = read_audio(ASSETS / "speech.wav")
    portrait, *people = (models.picture(np.array(Image.open(path))) for path in (ASSETS / "portrait.png", *PORTRAITS))
    frames = render_frames(models, portrait, speech[0])
    Image.fromarray(make_strip(frames)).save(flags.out / "demo.png", optimize=True)
    rate = models.vae.config.frame_rate_hz
    write_mp4(flags.out / "demo.mp4", [frames], rate, HIDDEN_FRAMES, speech, rate_hz)
    write_preview(flags.out / "demo.webp", frames, rate)
    twice = np.tile(speech, REPEATS)
    film = render_people(models, people, twice[0])
    write_mp4(flags.out / "people.mp4", [film], rate, HIDDEN_FRAMES, twice, rate_hz)
    for name in ("demo.png", "demo.mp4", "demo.webp", "people.mp4"):
        path = flags.out / name
        print(f"wrote {path}, {path.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
