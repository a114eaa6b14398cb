"""Real video as clips to learn from: `python -m training.video FILMS --out runs/data`.

FILMS is a folder of films in which one person talks and the picture is about the face; cut and crop them before. Each
is brought to 25 frames a second, one size and sound at 16 kHz, and cut into clips. One film in eight, chosen by
its name, is held out. Lips and jaw are not known: their figures are left out, and losses count all pixels alike.
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

from avatar.media import read_audio
from training.data import FRAME_RATE_HZ, FRAME_SAMPLES, SOUND_RATE_HZ, Clip, ClipShape, write_shard

HELD_OUT_SHARE = 8
# The film's first frame is the reference of its clips, which begin this much later.
FIRST_FRAME = 12


def pictures(film: Path, size: tuple[int, int]) -> Iterator[NDArray[np.uint8]]:
    """The film's frames (h, w, 3) at 25 Hz from time 0 on: what is shown at the middle of each 40 ms.

    ValueError if it is no film.
    """
    try:
        with av.open(str(film)) as container:
            if not container.streams.video:
                raise ValueError(f"{film} holds no picture")
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


def sound_of(film: Path) -> NDArray[np.float32]:
    """The film's sound, one channel at 16 kHz. ValueError if it has none that we read."""
    samples, rate_hz = read_audio(film)
    mono: NDArray[np.float32] = soxr.resample(samples.mean(0), rate_hz, SOUND_RATE_HZ)
    return mono


def clips_of(film: Path, shape: ClipShape, size: tuple[int, int]) -> Iterator[Clip]:
    """A film cut into clips one behind the other; what does not fill the last one is left out."""
    sound = sound_of(film)
    frames = pictures(film, size)
    reference = next(frames)
    gathered: list[NDArray[np.uint8]] = []
    start = FIRST_FRAME
    for number, frame in enumerate(frames, 1):
        if number < FIRST_FRAME:
            continue
        gathered.append(frame)
        if len(gathered) < shape.frames:
            continue
        lead_frames = min(start, shape.most_lead)
        heard = sound[(start - lead_frames) * FRAME_SAMPLES : (start + shape.frames + shape.tail) * FRAME_SAMPLES]
        whole = np.zeros((lead_frames + shape.frames + shape.tail) * FRAME_SAMPLES, np.float32)
        whole[: len(heard)] = heard
        arrays: dict[str, NDArray[Any]] = {
            "frames": np.stack(gathered),
            "reference": reference,
            "sound": (whole.clip(-1, 1) * 32767).astype(np.int16),
        }
        info = {"person": film.stem, "voice": film.stem, "text": "", "lead_frames": lead_frames}
        yield Clip(f"{film.stem.replace('.', '-')}-{start:06d}", arrays, info)
        start += shape.frames
        gathered = []


def part_of(film: Path) -> str:
    """Which part a film belongs to; its name decides."""
    return "held_out" if zlib.crc32(film.stem.encode()) % HELD_OUT_SHARE == 0 else "train"


def convert(films: Path, out: Path, shape: ClipShape, size: tuple[int, int]) -> dict[str, int]:
    """Write one shard for each film that has none yet; returns how many films each part has. ValueError without any."""
    found = {"train": 0, "held_out": 0}
    for film in sorted(path for path in films.iterdir() if path.is_file()):
        part = part_of(film)
        path = out / part / f"{film.stem}.tar"
        if not path.exists():
            write_shard(path, clips_of(film, shape, size))
        found[part] += 1
    if not sum(found.values()):
        raise ValueError(f"no films in {films}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.video", description=(__doc__ or "").split(":")[0])
    parser.add_argument("films", type=Path, help="folder of films, any that FFmpeg reads")
    parser.add_argument("--out", type=Path, required=True, help="folder for the parts train and held_out")
    parser.add_argument("--size", default="128x128", metavar="WxH", help="of frames, in pixels")
    parser.add_argument("--frames", type=int, default=ClipShape.frames, help="of a clip, whole blocks of 12")
    flags = parser.parse_args()
    width, height = map(int, flags.size.split("x"))
    found = convert(flags.films, flags.out, ClipShape(flags.frames), (width, height))
    print(f"{found['train']} films to train on, {found['held_out']} held out")


if __name__ == "__main__":
    main()
