"""Cut real video into training clips: `python -m training.video FILMS --out runs/data`.

FILMS is a folder of films that each show one talking person, already cut and cropped to the face. Each film is
converted to 25 frames a second, one size and audio at 16 kHz, and cut into clips. One film in eight, selected by its
name, is held out. The positions of lips and jaw are unknown: their metrics are left out, and losses weight all pixels
equally.
"""

import argparse
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import soxr
from numpy.typing import NDArray
from PIL import Image, ImageOps

from avatar.audio.decode import open_container
from avatar.media import read_audio
from training.data import AUDIO_RATE_HZ, FRAME_RATE_HZ, FRAME_SAMPLES, Clip, ClipShape, write_shard

HELD_OUT_SHARE = 8
# The film's first frame is the reference of its clips, which start this many frames later.
FIRST_FRAME = 12


def read_frames(film: Path, size: tuple[int, int]) -> Iterator[NDArray[np.uint8]]:
    """Yield the film's frames (h, w, 3) at 25 Hz from time 0 on, each the frame shown at the middle of its 40 ms.

    size: (width, height). ValueError if the file is not a film.
    """
    try:
        with film.open("rb") as file, open_container(file) as container:
            if not container.streams.video:
                raise ValueError(f"{film} has no video stream")
            shown: NDArray[np.uint8] | None = None
            number = 0
            for frame in container.decode(video=0):
                assert frame.time is not None
                while shown is not None and (number + 0.5) / FRAME_RATE_HZ < frame.time:
                    yield shown
                    number += 1
                image = Image.fromarray(frame.to_ndarray(format="rgb24"))
                shown = np.array(ImageOps.fit(image, size, Image.Resampling.BICUBIC))
            if shown is not None:
                yield shown
    except av.FFmpegError as error:
        raise ValueError(f"{film} is not a film, or is damaged: {error}") from error


def mono_audio(film: Path) -> NDArray[np.float32]:
    """Read the film's audio as one channel at 16 kHz, (s,). ValueError if it has none that can be decoded."""
    samples, rate_hz = read_audio(film)
    mono: NDArray[np.float32] = soxr.resample(samples.mean(0), rate_hz, AUDIO_RATE_HZ)
    return mono


def clips_of(film: Path, shape: ClipShape, size: tuple[int, int]) -> Iterator[Clip]:
    """Cut a film into consecutive clips; an incomplete last one is dropped."""
    audio = mono_audio(film)
    frames = read_frames(film, size)
    reference = next(frames)
    clip_frames: list[NDArray[np.uint8]] = []
    start = FIRST_FRAME
    for number, frame in enumerate(frames, 1):
        if number < FIRST_FRAME:
            continue
        clip_frames.append(frame)
        if len(clip_frames) < shape.num_frames:
            continue
        lead_frames = min(start, shape.max_lead_frames)
        first, end = start - lead_frames, start + shape.num_frames + shape.tail_frames
        span = audio[first * FRAME_SAMPLES : end * FRAME_SAMPLES]
        padded = np.zeros((end - first) * FRAME_SAMPLES, np.float32)
        padded[: len(span)] = span
        arrays: dict[str, NDArray[Any]] = {
            "frames": np.stack(clip_frames),
            "reference": reference,
            "sound": (padded.clip(-1, 1) * 32767).astype(np.int16),
        }
        info = {"person": film.stem, "voice": film.stem, "text": "", "lead_frames": lead_frames}
        yield Clip(f"{film.stem.replace('.', '-')}-{start:06d}", arrays, info)
        start += shape.num_frames
        clip_frames = []


def split_of(film: Path) -> str:
    """Return the split of a film, from the checksum of its name."""
    return "held_out" if zlib.crc32(film.stem.encode()) % HELD_OUT_SHARE == 0 else "train"


def convert(films: Path, out: Path, shape: ClipShape, size: tuple[int, int]) -> dict[str, int]:
    """Write a shard for each film that has none; return the number of films per split. ValueError without films."""
    counts = {"train": 0, "held_out": 0}
    for film in sorted(path for path in films.iterdir() if path.is_file()):
        split = split_of(film)
        path = out / split / f"{film.stem}.tar"
        if not path.exists():
            write_shard(path, clips_of(film, shape, size))
        counts[split] += 1
    if not sum(counts.values()):
        raise ValueError(f"no films in {films}")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.video", description=(__doc__ or "").split(":")[0])
    parser.add_argument("films", type=Path, help="folder of films in any format that FFmpeg reads")
    parser.add_argument("--out", type=Path, required=True, help="folder for the splits train and held_out")
    parser.add_argument("--size", default="128x128", metavar="WxH", help="size of frames in pixels (default 128x128)")
    parser.add_argument("--frames", type=int, default=ClipShape.num_frames, help="length of a clip, whole blocks")
    flags = parser.parse_args()
    width, height = map(int, flags.size.split("x"))
    counts = convert(flags.films, flags.out, ClipShape(flags.frames), (width, height))
    print(f"{counts['train']} films for training, {counts['held_out']} held out")


if __name__ == "__main__":
    main()
