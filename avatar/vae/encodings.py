"""A block's frames as what a client asked for: raw, JPEG, or H.264, bare or in fragments of MP4.

Every block is encoded by itself: it begins with a key frame and refers to no other, so that a stream that is rebuilt
gives the same bytes, and whoever relays blocks may leave any out. That takes a new encoder a block, which costs less
than a tenth of encoding it.

Axes: f frames, h w height and width of frames.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

import av
import numpy as np
from av.video.codeccontext import VideoCodecContext
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from numpy.typing import NDArray
from PIL import Image

Frames: TypeAlias = NDArray[np.uint8]

DEFAULT_QUALITY = 80
# x264's constant rate factors of qualities 1 and 100.
LOWEST_CRF, HIGHEST_CRF = 45.0, 10.0
# No frame waits for a later one, and key frames are where a block begins.
X264 = {"preset": "superfast", "tune": "zerolatency", "x264-params": "keyint=1000:min-keyint=1000:scenecut=0"}
# One fragment, cut by us; times as they are given, also of the first frame; nothing behind it.
FRAGMENT = {
    "movflags": "frag_custom+empty_moov+default_base_moof+frag_discont+skip_trailer",
    "avoid_negative_ts": "disabled",
    "use_editlist": "0",
    "brand": "iso6",
}


@dataclass(frozen=True)
class Encoded:
    """Frames in their encoding.

    is_key: whether they can be decoded without frames before them. num_frames: how many `data` holds.
    """

    data: bytes
    is_key: bool = True
    num_frames: int = 1


def encode(frames: Frames, encoding: str, frame_rate_hz: int, quality: int = 0, first_frame: int = 0) -> list[Encoded]:
    """A block's frames (f, h, w, 3) uint8 RGB in their encoding.

    quality: as in `check_quality`. first_frame: number of frames[0], which a fragment of MP4 has as its time.
    """
    return ENCODINGS[encoding](frames, frame_rate_hz, quality or DEFAULT_QUALITY, first_frame)


def check_encoding(encoding: str) -> None:
    """ValueError unless there is such an encoding."""
    if encoding not in ENCODINGS:
        raise ValueError(f"encoding is {encoding!r}, expected one of {', '.join(ENCODINGS)}")


def check_quality(quality: int) -> None:
    """ValueError unless the quality is 0 for the usual one, or 1 to 100."""
    if not 0 <= quality <= 100:
        raise ValueError(f"quality is {quality}, expected 1 to 100, or 0 for {DEFAULT_QUALITY}")


def init_segment(encoding: str, height: int, width: int, frame_rate_hz: int, quality: int = 0) -> bytes:
    """What comes before all fragments in fragmented MP4; empty in other encodings."""
    if encoding != "fmp4":
        return b""
    film = _film(np.zeros((1, height, width, 3), np.uint8), frame_rate_hz, quality or DEFAULT_QUALITY, 0)
    return film[: _fragment_at(film)]


def describe_picture(context: VideoCodecContext, height: int, width: int, frame_rate: int) -> None:
    """Tell an encoder what `picture_frame` makes: 4:2:0 in BT.709 of limited range, labelled so."""
    context.height, context.width, context.pix_fmt = height, width, "yuv420p"
    context.time_base, context.framerate = Fraction(1, frame_rate), Fraction(frame_rate)
    context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
    context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709


def picture_frame(image: NDArray[np.uint8], number: int, frame_rate: int) -> av.VideoFrame:
    """An image (h, w, 3) at its time in the film."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24").reformat(
        format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
    )
    frame.pts, frame.time_base = number, Fraction(1, frame_rate)
    return frame


def _rgb24(frames: Frames, frame_rate_hz: int, quality: int, first_frame: int) -> list[Encoded]:  # noqa: ARG001
    return [Encoded(frame.tobytes()) for frame in np.ascontiguousarray(frames)]


def _jpeg(frames: Frames, frame_rate_hz: int, quality: int, first_frame: int) -> list[Encoded]:  # noqa: ARG001
    encoded = []
    for frame in frames:
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "JPEG", quality=quality)
        encoded.append(Encoded(file.getvalue()))
    return encoded


def _h264(frames: Frames, frame_rate_hz: int, quality: int, first_frame: int) -> list[Encoded]:  # noqa: ARG001
    """Access units in annex B form; parameter sets lie before the key frame."""
    context = av.CodecContext.create("libx264", "w")
    _set_up(context, frames, frame_rate_hz, quality)
    pictures = [picture_frame(frame, i, frame_rate_hz) for i, frame in enumerate(frames)]
    packets = [packet for picture in [*pictures, None] for packet in context.encode(picture)]
    assert len(packets) == len(frames), "without look-ahead every frame is answered"
    return [Encoded(bytes(packet), packet.is_keyframe) for packet in packets]


def _fmp4(frames: Frames, frame_rate_hz: int, quality: int, first_frame: int) -> list[Encoded]:
    """One fragment, moof and mdat, whose time is the number of its first frame."""
    film = _film(frames, frame_rate_hz, quality, first_frame)
    return [Encoded(film[_fragment_at(film) :], num_frames=len(frames))]


def _film(frames: Frames, frame_rate_hz: int, quality: int, first_frame: int) -> bytes:
    """Init segment and one fragment; the unit of time is a frame."""
    file = io.BytesIO()
    scales = dict.fromkeys(("video_track_timescale", "movie_timescale"), str(frame_rate_hz))
    options = {**FRAGMENT, **scales, "fragment_index": str(first_frame + 1)}
    with av.open(file, "w", format="mp4", options=options) as film:
        stream = film.add_stream("libx264", rate=frame_rate_hz)
        _set_up(stream.codec_context, frames, frame_rate_hz, quality)
        for number, frame in enumerate(frames, first_frame):
            film.mux(stream.encode(picture_frame(frame, number, frame_rate_hz)))
        film.mux(stream.encode(None))
    return file.getvalue()


def _set_up(context: VideoCodecContext, frames: Frames, frame_rate_hz: int, quality: int) -> None:
    height, width = frames.shape[1:3]
    describe_picture(context, height, width, frame_rate_hz)
    context.thread_count = 1
    crf = LOWEST_CRF + (HIGHEST_CRF - LOWEST_CRF) * (quality - 1) / 99
    context.options = {**X264, "crf": f"{crf:.1f}"}


def _fragment_at(film: bytes) -> int:
    """Where the moof box begins."""
    at = 0
    while film[at + 4 : at + 8] != b"moof":
        at += int.from_bytes(film[at : at + 4], "big")
    return at


# frames, frames a second, quality from 1 to 100, number of the first frame.
ENCODINGS: dict[str, Callable[[Frames, int, int, int], list[Encoded]]] = {
    "rgb24": _rgb24,
    "jpeg": _jpeg,
    "h264": _h264,
    "fmp4": _fmp4,
}
