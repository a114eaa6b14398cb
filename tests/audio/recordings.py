"""Audio files of several kinds, written with FFmpeg."""

import io
from fractions import Fraction
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

RATE_HZ = 16000
# The kinds of file: FFmpeg's container, its codec, and the sample rate that the codec takes.
KINDS: dict[str, tuple[str, str, int]] = {
    "wav": ("wav", "pcm_s16le", RATE_HZ),
    "aiff": ("aiff", "pcm_s16be", RATE_HZ),
    "flac": ("flac", "flac", RATE_HZ),
    "mp3": ("mp3", "libmp3lame", RATE_HZ),
    "ogg": ("ogg", "libopus", 48000),
    "webm": ("webm", "libopus", 48000),
    "aac": ("adts", "aac", RATE_HZ),
    "m4a": ("mp4", "aac", RATE_HZ),
    "caf": ("caf", "pcm_s16le", RATE_HZ),
    "w64": ("w64", "pcm_s16le", RATE_HZ),
    "au": ("au", "pcm_s16be", RATE_HZ),
    "tta": ("tta", "tta", RATE_HZ),
}
LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}


def voice(seconds: float, channels: int = 1, rate_hz: int = RATE_HZ) -> NDArray[np.float32]:
    """Return a noisy tone (channels, s), every channel the same."""
    times = np.arange(round(seconds * rate_hz)) / rate_hz
    noise = np.random.default_rng(0).standard_normal(len(times))
    one = (0.3 * np.sin(2 * np.pi * 440 * times) + 0.1 * noise).astype(np.float32)
    return np.repeat(one[None], channels, axis=0)


def encode(samples: NDArray[np.float32], kind: str, rate_hz: int = RATE_HZ, codec: str | None = None) -> bytes:
    """Return a file of samples (a, s) at this rate; the index of an m4a is at its end."""
    container_name, default_codec, codec_hz = KINDS[kind]
    layout, file = LAYOUTS[len(samples)], io.BytesIO()
    with av.open(file, "w", format=container_name) as container:
        out_hz = codec_hz if codec_hz != RATE_HZ else rate_hz
        stream: Any = container.add_stream(codec or default_codec, rate=out_hz, layout=layout)
        for start in range(0, samples.shape[1], 1000):
            piece = np.ascontiguousarray(samples[:, start : start + 1000])
            frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout=layout)
            frame.rate, frame.pts, frame.time_base = rate_hz, start, Fraction(1, rate_hz)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()
