"""Clips of talking people in shards: tar files as webdataset's, of arrays that are read where they lie.

    CLIP.frames.npy     (f, h, w, 3) uint8 RGB at 25 Hz
    CLIP.reference.npy  (h, w, 3) uint8: the same person, mouth at rest, another pose
    CLIP.sound.npy      (s,) int16 at 16 kHz: `lead_frames` of sound before the first frame, and some behind the last
    CLIP.lips.npy       (f, 2) float32: row and column of the lips' middle, in pixels; where that is known
    CLIP.jaw.npy        (f,) float32: how far the mouth is open, 0 to 1; where that is known
    CLIP.json           person, voice, text, lead_frames

A shard is complete or not there: it is written under another name first.
"""

import argparse
import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FRAME_RATE_HZ = 25
SOUND_RATE_HZ = 16000
FRAME_SAMPLES = SOUND_RATE_HZ // FRAME_RATE_HZ
PARTS = ("train", "held_out")
SHARE_HELP = "I/N: make every Nth shard from the Ith, beside other programs"


def a_share(text: str) -> tuple[int, int]:
    """The value of a flag `--share`: (i, n) of `I/N`, every nth shard from the ith."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"must be I/N with 0 <= I < N, got {text!r}")
    return int(index), int(count)


@dataclass(frozen=True)
class ClipShape:
    """How long clips are, in frames.

    frames: pictures, whole blocks of 12. most_lead: of sound before the first picture, whole blocks too, so that a clip
    lies on a stream's blocks. tail: of sound after the last, for encoders that look ahead.
    """

    frames: int = 60
    most_lead: int = 60
    tail: int = 16


@dataclass(frozen=True, eq=False)
class Clip:
    """A clip to be written: arrays by name, and what else is known of it."""

    name: str
    arrays: Mapping[str, NDArray[Any]]
    info: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class StoredClip:
    """A clip in a shard; its arrays are mapped from the file, and nothing is read before it is used."""

    shard: Path
    name: str
    offsets: Mapping[str, int]
    info: Mapping[str, Any]

    def has(self, name: str) -> bool:
        return name in self.offsets

    def array(self, name: str) -> NDArray[Any]:
        """One of the clip's arrays, read-only. ValueError if this clip has none of that name."""
        if not self.has(name):
            raise ValueError(f"clip {self.name} of {self.shard} has no {name!r}, only {', '.join(self.offsets)}")
        with self.shard.open("rb") as file:
            file.seek(self.offsets[name])
            version = np.lib.format.read_magic(file)
            assert version == (1, 0), version
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            assert not fortran
            return np.memmap(self.shard, dtype, "r", file.tell(), shape)


def write_shard(path: Path, clips: Iterable[Clip]) -> None:
    """Write clips as a tar file whose bytes depend on the clips alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with tarfile.open(partial, "w") as tar:
        for clip in clips:
            for name, array in clip.arrays.items():
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
    """The clips of a shard, in their order. ValueError if it is no such file."""
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
                    offsets.setdefault(clip, {})[kind.removesuffix(".npy")] = member.offset_data
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not a shard of clips: {error}") from error
    return [StoredClip(path, name, offsets[name], infos[name]) for name in offsets]


def read_clips(folder: Path, part: str) -> list[StoredClip]:
    """All clips of a part that are there now, in the order of their numbers. ValueError if there are none."""
    clips = [clip for path in sorted((folder / part).glob("*.tar")) for clip in read_shard(path)]
    if not clips:
        raise ValueError(f"no shards in {folder / part}; make some: python -m training.make_data --out {folder}")
    return clips
