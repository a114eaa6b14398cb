"""Clips of talking people in shards: tar files in webdataset's layout whose arrays are memory-mapped.

    CLIP.frames.mjpeg   the frames at 25 Hz as JPEGs in a row, and
    CLIP.offsets.npy    (f + 1,) int64: where each begins and the last ends; or
    CLIP.frames.npy     (f, h, w, 3) uint8 RGB
    CLIP.reference.npy  (h, w, 3) uint8: the same person with the mouth at rest, in another pose
    CLIP.sound.npy      (s,) int16 the person's audio at 16 kHz: `lead_frames` before the first frame, and a tail
    CLIP.other.npy      (s,) int16 audio of whom the person listens to, silence where there is nobody; optional
    CLIP.lips.npy       (f, 2) float32: row and column of the lips' centre in pixels; optional
    CLIP.TRUTH.npy      float32 truth of synthetic people, optional:
        jaw, blink, brow, smile  (f,) 0 to 1: open jaw, closed lids, raised brows, smile
        gap                      (f,) height of the opening between the inner lips in pixels
        pose                     (f, 3) pitch (positive looks down), yaw (positive to the right), roll in radians
        reference_pose           (3,) the pose in the reference
        gaze                     (f, 2) direction of the eyes in radians, right and up of the viewer
        nod                      (f,) radians of pitch that answer the other
        speaking                 (f, 2) 0 or 1: a phrase of the person, of the other
    CLIP.json           person, voice, text, lead_frames; of synthetic people also kind, other_voice, other_text,
                        other_is_dropped, and phones: [seconds from the first frame, phone] of the person

A shard is written under a temporary name and renamed, so a file named *.tar is always complete.
"""

import argparse
import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FRAME_RATE_HZ = 25
AUDIO_RATE_HZ = 16000
FRAME_SAMPLES = AUDIO_RATE_HZ // FRAME_RATE_HZ
SPLITS = ("train", "held_out", "test")
# Of stored frames, without subsampling of colour: 45 dB or more on synthetic people at a tenth of the bytes.
JPEG_QUALITY = 96
SHARE_HELP = "I/N: make every Nth shard from the Ith on, so that N programs can share the work"


def parse_share(text: str) -> tuple[int, int]:
    """Parse a `--share I/N` flag into (i, n): every nth shard from the ith on."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"must be I/N with 0 <= I < N, got {text!r}")
    return int(index), int(count)


@dataclass(frozen=True)
class ClipShape:
    """Lengths of a clip, in frames of 40 ms.

    num_frames: of video, whole blocks. max_lead_frames: of audio before the first video frame, also whole blocks,
    so that a clip lines up with the blocks of a stream. tail_frames: of audio after the last video frame, for audio
    encoders that look ahead.
    """

    num_frames: int = 60
    max_lead_frames: int = 60
    tail_frames: int = 16


@dataclass(frozen=True, eq=False)
class Clip:
    """A clip to write: arrays by name, its JSON record, and its frames as JPEGs if they are not among the arrays."""

    name: str
    arrays: Mapping[str, NDArray[Any]]
    info: Mapping[str, Any]
    jpegs: Sequence[bytes] = ()


@dataclass(frozen=True, eq=False)
class StoredClip:
    """A clip in a shard. Arrays are memory-mapped; only the parts that are used are read."""

    shard: Path
    name: str
    offsets: Mapping[str, int]
    info: Mapping[str, Any]

    def has(self, name: str) -> bool:
        return name in self.offsets

    def array(self, name: str) -> NDArray[Any]:
        """Map one of the clip's arrays, read-only. ValueError if the clip has none of that name."""
        if not self.has(name):
            raise ValueError(f"clip {self.name} of {self.shard} has no {name!r}, only {', '.join(self.offsets)}")
        with self.shard.open("rb") as file:
            file.seek(self.offsets[name])
            version = np.lib.format.read_magic(file)
            assert version == (1, 0), version
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            assert not fortran
            return np.memmap(self.shard, dtype, "r", file.tell(), shape)

    @property
    def is_heard(self) -> bool:
        """True if the clip has audio of the other person, silent or not, that was not dropped."""
        return self.has("other") and not self.info.get("other_is_dropped", False)

    @property
    def num_frames(self) -> int:
        return len(self.array("offsets")) - 1 if self.has("offsets") else len(self.array("frames"))

    def frames(self, span: slice = slice(None)) -> NDArray[np.uint8]:
        """Read a span of the clip's frames, (f, h, w, 3) RGB."""
        if not self.has("offsets"):
            return np.array(self.array("frames")[span])
        bounds = self.array("offsets")
        pictures = []
        with self.shard.open("rb") as file:
            for index in range(*span.indices(len(bounds) - 1)):
                file.seek(self.offsets["frames"] + int(bounds[index]))
                pictures.append(decode_jpeg(file.read(int(bounds[index + 1] - bounds[index]))))
        return np.stack(pictures)


def encode_jpeg(picture: NDArray[np.uint8], quality: int = JPEG_QUALITY) -> bytes:
    """Encode a picture (h, w, 3)."""
    data = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(data, "jpeg", quality=quality, subsampling=0)
    return data.getvalue()


def decode_jpeg(data: bytes) -> NDArray[np.uint8]:
    """Decode a picture (h, w, 3)."""
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image)


def write_shard(path: Path, clips: Iterable[Clip]) -> None:
    """Write clips as a tar file. Its bytes depend on the clips alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with tarfile.open(partial, "w") as tar:
        for clip in clips:
            arrays = dict(clip.arrays)
            if clip.jpegs:
                add_member(tar, f"{clip.name}.frames.mjpeg", b"".join(clip.jpegs))
                arrays["offsets"] = np.cumsum([0, *map(len, clip.jpegs)])
            for name, array in arrays.items():
                data = io.BytesIO()
                np.lib.format.write_array(data, np.ascontiguousarray(array), version=(1, 0))
                add_member(tar, f"{clip.name}.{name}.npy", data.getvalue())
            add_member(tar, f"{clip.name}.json", json.dumps(dict(clip.info)).encode())
    partial.rename(path)


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def read_shard(path: Path) -> list[StoredClip]:
    """Read the index of a shard and return its clips in order. ValueError if the file is not a tar file."""
    offsets: dict[str, dict[str, int]] = {}
    infos: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                clip, _, kind = member.name.partition(".")
                if kind == "json":
                    file = tar.extractfile(member)
                    assert file is not None
                    infos[clip] = json.loads(file.read())
                else:
                    offsets.setdefault(clip, {})[kind.rpartition(".")[0]] = member.offset_data
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not a shard of clips: {error}") from error
    return [StoredClip(path, name, offsets[name], infos[name]) for name in offsets]


class SplitFolder:
    """The clips of a split whose shards arrive while a run lasts: each shard is read once."""

    def __init__(self, folder: Path, split: str) -> None:
        self._folder, self._split = folder, split
        self._shards: dict[Path, list[StoredClip]] = {}

    def read_new(self) -> dict[Path, list[StoredClip]]:
        """Read the shards that were not added yet."""
        paths = sorted((self._folder / self._split).glob("*.tar"))
        return {path: read_shard(path) for path in paths if path not in self._shards}

    def add(self, shards: Mapping[Path, list[StoredClip]]) -> list[StoredClip]:
        """Add shards, and return all clips in the order of the shards' names. ValueError if there are none."""
        self._shards = dict(sorted({**self._shards, **shards}.items()))
        clips = [clip for each in self._shards.values() for clip in each]
        if not clips:
            folder = self._folder / self._split
            raise ValueError(f"no shards in {folder}; make some: python -m training.make_data --out {self._folder}")
        return clips


def read_clips(folder: Path, split: str) -> list[StoredClip]:
    """Return all clips that a split has now, in the order of its shards. ValueError if it has none."""
    split_folder = SplitFolder(folder, split)
    return split_folder.add(split_folder.read_new())
