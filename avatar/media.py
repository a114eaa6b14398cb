"""Reading of audio and video files, and writing of MP4. It loads no torch, so that clients can use it.

Axes: a audio channels, s samples, f pixel frames, h w height and width.
"""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import OutputContainer
from numpy.typing import NDArray

from avatar.audio.alignment import MAX_RATE_HZ, MIN_RATE_HZ
from avatar.vae.encodings import set_picture_format, to_video_frame

AAC_RATE_HZ = 48000
"""Every player supports AAC at this rate; the encoder does not support every rate that speech may have."""

LAYOUTS = {1: "mono", 2: "stereo"}


def read_audio(path: Path) -> tuple[NDArray[np.float32], int]:
    """Return samples (a, s) float32 and their rate in Hz, of the first audio stream in any file that FFmpeg reads.

    Integers are scaled by their full range (16 bits: by 1/32768), floats are unchanged. ValueError if the file has no
    audio, is empty or damaged, or has other than 1 or 2 channels or a rate outside 8 to 48 kHz.
    """
    if not path.is_file():
        raise ValueError(f"no audio file at {path}")
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise ValueError(f"{path} is not an audio file: it has no audio stream")
            stream = container.streams.audio[0]
            rate_hz, num_channels = stream.rate, stream.channels
            if not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ:
                raise ValueError(f"{path} has {rate_hz} Hz, expected {MIN_RATE_HZ} to {MAX_RATE_HZ}")
            if num_channels not in (1, 2):
                raise ValueError(f"{path} has {num_channels} channels, expected 1 or 2")
            to_float = av.AudioResampler(format="fltp")
            pieces = [piece.to_ndarray() for frame in container.decode(stream) for piece in to_float.resample(frame)]
    except av.FFmpegError as error:
        raise ValueError(f"{path} is not an audio file, or is damaged: {error}") from error
    if not sum(piece.shape[1] for piece in pieces):
        raise ValueError(f"{path} is empty: no samples")
    return np.concatenate(pieces, axis=1), rate_hz


def read_video(path: Path, rate_hz: int) -> Iterator[NDArray[np.uint8]]:
    """Yield every n-th frame (h, w, 3) RGB of a video, n = its rate / rate_hz rounded, at least 1.

    ValueError if the file has no video or is damaged.
    Source: the sampling of the reference implementation of arXiv 2512.04677.
    """
    if not path.is_file():
        raise ValueError(f"no video file at {path}")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} is not a video file: it has no video stream")
            stream = container.streams.video[0]
            step = max(1, round((stream.average_rate or rate_hz) / rate_hz))
            for frame in islice(container.decode(stream), 0, None, step):
                yield np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
    except av.FFmpegError as error:
        raise ValueError(f"{path} is not a video file, or is damaged: {error}") from error


def write_mp4(
    path: Path,
    frames: Iterable[NDArray[np.uint8]],
    frame_rate: int,
    first_frame: int,
    samples: NDArray[np.float32],
    rate_hz: int,
) -> None:
    """Write an MP4 of H.264 and AAC; video starts at first_frame / frame_rate seconds, audio at 0.

    frames: chunks (f, h, w, 3) uint8 RGB of one size, h and w even; consumed one at a time.
    samples: (a, s) float32 in [-1, 1], 1 or 2 channels.
    The file is renamed into place when it is complete. The offset of the video is stored as an empty edit in the edit
    list. ValueError if there are no frames or no samples, or the frames' size is odd.
    """
    chunks = iter(frames)
    first = next(chunks, None)
    if first is None or not samples.size:
        raise ValueError(f"a video needs frames and audio, got no {'frames' if first is None else 'samples'}")
    height, width = first.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"frames must have even sides, got {height} x {width}")
    partial = path.with_name(f".{path.name}.partial")
    try:
        with av.open(str(partial), "w", format="mp4", options={"movflags": "faststart"}) as container:
            video = container.add_stream("libx264", rate=frame_rate, options={"crf": "18"})
            set_picture_format(video.codec_context, height, width, frame_rate)
            audio = container.add_stream("aac", rate=AAC_RATE_HZ, layout=LAYOUTS[len(samples)])
            frame_number, start = first_frame, 0
            for chunk in chain([first], chunks):
                for image in chunk:
                    container.mux(video.encode(to_video_frame(image, frame_number, frame_rate)))
                    frame_number += 1
                # Audio is interleaved with video, so that a reader finds both without seeking.
                end = frame_number * rate_hz // frame_rate
                mux_audio(container, audio, samples, start, end, rate_hz)
                start = end
            mux_audio(container, audio, samples, start, samples.shape[1], rate_hz)
            container.mux(video.encode(None))
            container.mux(audio.encode(None))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def mux_audio(
    container: OutputContainer, stream: AudioStream, samples: NDArray[np.float32], start: int, end: int, rate_hz: int
) -> None:
    """Encode samples start .. end (exclusive) at their time, as far as there are any."""
    part = np.ascontiguousarray(samples[:, start:end])
    if part.size:  # encoding an empty frame would end the stream
        frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=LAYOUTS[len(part)])
        frame.rate, frame.pts, frame.time_base = rate_hz, start, Fraction(1, rate_hz)
        container.mux(stream.encode(frame))
