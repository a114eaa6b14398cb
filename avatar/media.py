"""Reading of audio and video files, and writing of films. It loads no torch, so that clients can use it.

A path is always a file's, whatever it looks like: `take:1.mp4` is no protocol.

Axes: a audio channels, s samples, f pixel frames, h w height and width.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import OutputContainer
from numpy.typing import NDArray

from avatar.audio.decode import decode_audio, open_container
from avatar.vae.encodings import set_picture_format, to_video_frame, with_marks
from avatar.vae.marks.metadata import SOURCE_TYPE, XMP_BOX

if TYPE_CHECKING:
    from avatar.vae.marks.credentials import FilmSigner

logger = logging.getLogger(__name__)

# FFmpeg's names of the kinds of film that are written, by the ends of their names.
FILM_FORMATS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov"}

AAC_RATE_HZ = 48000
"""Every player supports AAC at this rate; the encoder does not support every rate that speech may have."""

LAYOUTS = {1: "mono", 2: "stereo"}


def read_audio(path: Path) -> tuple[NDArray[np.float32], int]:
    """Return samples (1 or 2, s) float32 and their rate in Hz, 8000 to 48000, of any file that FFmpeg decodes.

    Integers are scaled by their full range (16 bits: by 1/32768), floats are unchanged. Of several audio streams the
    first is read. What cannot be decoded is left out, other rates are resampled, and more than two channels, or two
    that cancel each other, are mixed down as by `mix_down`; a warning in the log says what is missing or changed.
    ValueError if nothing in the file can be decoded, its rate is below 8000 Hz, or it is longer than `MAX_NUMBERS`.
    """
    if not path.is_file():
        raise ValueError(f"no audio file at {path}")
    with path.open("rb") as file:
        try:
            audio = decode_audio(file)
        except ValueError as error:
            raise ValueError(f"{path} {error}") from error
    for note in audio.notes:
        logger.warning("%s %s", path, note)
    return audio.samples, audio.rate_hz


def read_video(path: Path, rate_hz: int) -> Iterator[NDArray[np.uint8]]:
    """Yield every n-th frame (h, w, 3) RGB of a video, n = its rate / rate_hz rounded, at least 1.

    ValueError if the file has no video or is damaged.
    Source: the sampling of the reference implementation of arXiv 2512.04677.
    """
    if not path.is_file():
        raise ValueError(f"no video file at {path}")
    try:
        with path.open("rb") as file, open_container(file) as container:
            if not container.streams.video:
                raise ValueError(f"{path} is not a video file: it has no video stream")
            stream = container.streams.video[0]
            step = max(1, round((stream.average_rate or rate_hz) / rate_hz))
            for frame in islice(container.decode(stream), 0, None, step):
                yield np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
    except av.FFmpegError as error:
        raise ValueError(f"{path} is not a video file, or is damaged: {error.strerror}") from error


def film_signer(files: Sequence[Path] | None) -> "FilmSigner | None":
    """Return what signs films with a certificate and its key, PEM files; None without them.

    ValueError if they cannot sign, or the package for it is not installed.
    """
    if files is None:
        return None
    try:
        from avatar.vae.marks.credentials import FilmSigner
    except ImportError as error:
        raise ValueError("films are signed by the package c2pa-python; install it: pip install c2pa-python") from error
    return FilmSigner(*files)


@dataclass(frozen=True)
class Film:
    """A written film: its frames of width x height pixels, and the seconds from the audio's start to the last frame."""

    num_frames: int
    width: int
    height: int
    duration_s: float


def check_film_name(path: Path) -> None:
    """Raise ValueError unless the name is a film's, of a kind in FILM_FORMATS, and no folder has it."""
    if path.suffix.lower() not in FILM_FORMATS:
        raise ValueError(f"{path} is not the name of a film: expected one that ends in {', '.join(FILM_FORMATS)}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected the name of a film to write")


def write_mp4(
    path: Path,
    frames: Iterable[NDArray[np.uint8]],
    frame_rate: int,
    first_frame: int,
    samples: NDArray[np.float32],
    rate_hz: int,
    *,
    is_marked: bool = True,
    signer: "FilmSigner | None" = None,
) -> Film:
    """Write a film of H.264 and AAC: video starts at first_frame / frame_rate seconds, audio at 0.

    Audio after the last frame is left out.

    path: its ending is one of FILM_FORMATS. frames: chunks (f, h, w, 3) uint8 RGB of one size, h and w even; consumed
    one at a time. samples: (a, s) float32 in [-1, 1], 1 or 2 channels. is_marked: key frames, the film's comment and an
    XMP packet at its end say that a machine made it. signer: as of `film_signer`.
    The file is renamed into place when it is complete. The offset of the video is stored as an empty edit in the edit
    list. ValueError if there are no frames or no samples, the frames' size is odd, or as in `check_film_name`; OSError
    if the file cannot be written.
    """
    check_film_name(path)
    chunks = iter(frames)
    first = next(chunks, None)
    if first is None or not samples.size:
        raise ValueError(f"a video needs frames and audio, got no {'frames' if first is None else 'samples'}")
    height, width = first.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"frames must have even sides, got {height} x {width}")
    partial = path.with_name(f".{path.name}.partial")
    # FFmpeg takes a name up to a colon for a protocol, and opens the file a second time to move its index.
    url, kind = f"file:{partial.absolute()}", FILM_FORMATS[path.suffix.lower()]
    try:
        with av.open(url, "w", format=kind, options={"movflags": "faststart"}) as container:
            video = container.add_stream("libx264", rate=frame_rate, options={"crf": "18"})
            set_picture_format(video.codec_context, height, width, frame_rate)
            audio = container.add_stream("aac", rate=AAC_RATE_HZ, layout=LAYOUTS[len(samples)])
            if is_marked:
                container.metadata["comment"] = f"made by a machine: {SOURCE_TYPE}"
            frame_number, start = first_frame, 0
            for chunk in chain([first], chunks):
                for image in chunk:
                    packets = video.encode(to_video_frame(image, frame_number, frame_rate))
                    container.mux(with_marks(packets, is_marked=is_marked))
                    frame_number += 1
                # Audio is interleaved with video, so that a reader finds both without seeking.
                end = frame_number * rate_hz // frame_rate
                mux_audio(container, audio, samples, start, end, rate_hz)
                start = end
            container.mux(with_marks(video.encode(None), is_marked=is_marked))
            container.mux(audio.encode(None))
        if is_marked:
            with partial.open("ab") as file:
                file.write(XMP_BOX)
        if signer is not None:
            signer.sign(partial, kind)
        partial.replace(path)
    except av.FFmpegError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)
    return Film(frame_number - first_frame, width, height, frame_number / frame_rate)


def mux_audio(
    container: OutputContainer, stream: AudioStream, samples: NDArray[np.float32], start: int, end: int, rate_hz: int
) -> None:
    """Encode samples start .. end (exclusive) at their time, as far as there are any."""
    part = np.ascontiguousarray(samples[:, start:end])
    if part.size:  # encoding an empty frame would end the stream
        frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=LAYOUTS[len(part)])
        frame.rate, frame.pts, frame.time_base = rate_hz, start, Fraction(1, rate_hz)
        container.mux(stream.encode(frame))
