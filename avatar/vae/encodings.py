"""Encodings of frames: raw RGB, JPEG, H.264 (Annex B), or H.264 in fragmented MP4.

H.264 encodes frames in groups, of a block or of a latent frame. Every group is encoded independently: it starts with a
key frame and refers to no other group, so that a rebuilt stream gives the same bytes and a relay may drop any block.
The new encoder per block costs less than a tenth of its encoding.

Encodings that can carry a mark for machines have one, unless it is turned off: see `marks`.

Axes: f frames, h w height and width of frames.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, TypeAlias

import av
import numpy as np
from av.video.codeccontext import VideoCodecContext
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from numpy.typing import NDArray
from PIL import Image

from avatar.vae.marks.metadata import XMP, XMP_BOX, mark_key_frame

Frames: TypeAlias = NDArray[np.uint8]
Packet: TypeAlias = "av.Packet[Any]"

DEFAULT_QUALITY = 80
# x264's constant rate factors for qualities 1 and 100.
LOWEST_CRF, HIGHEST_CRF = 45.0, 10.0
# No look-ahead and no B-frames; the only key frame is a group's first.
X264 = {"preset": "superfast", "tune": "zerolatency", "x264-params": "keyint=1000:min-keyint=1000:scenecut=0"}
# One fragment, cut by us; timestamps unchanged, also the first frame's; no trailer.
FRAGMENT = {
    "movflags": "frag_custom+empty_moov+default_base_moof+frag_discont+skip_trailer",
    "avoid_negative_ts": "disabled",
    "use_editlist": "0",
    "brand": "iso6",
}


@dataclass(frozen=True)
class Encoded:
    """Encoded frames.

    is_key: they can be decoded without earlier frames. num_frames: frames in `data`.
    """

    data: bytes
    is_key: bool = True
    num_frames: int = 1


def encode(
    frames: Frames,
    encoding: str,
    frame_rate_hz: int,
    quality: int = 0,
    first_frame: int = 0,
    *,
    is_marked: bool = True,
) -> list[Encoded]:
    """Encode frames (f, h, w, 3) uint8 RGB, a group of them if the encoding is one of GROUPED.

    encoding: a key of ENCODINGS. quality: as in `check_quality`. first_frame: number of frames[0] in the session, the
    time of an MP4 fragment. is_marked: with the encoding's marks for machines.
    """
    return ENCODINGS[encoding](frames, frame_rate_hz, quality or DEFAULT_QUALITY, first_frame, is_marked)


def check_encoding(encoding: str) -> None:
    """Raise ValueError unless the encoding is one of ENCODINGS."""
    if encoding not in ENCODINGS:
        raise ValueError(f"encoding is {encoding!r}, expected one of {', '.join(ENCODINGS)}")


def check_quality(quality: int) -> None:
    """Raise ValueError unless the quality is 0 (for DEFAULT_QUALITY) or 1 to 100."""
    if not 0 <= quality <= 100:
        raise ValueError(f"quality is {quality}, expected 1 to 100, or 0 for {DEFAULT_QUALITY}")


def init_segment(
    encoding: str, height: int, width: int, frame_rate_hz: int, quality: int = 0, *, is_marked: bool = True
) -> bytes:
    """Return the init segment of fragmented MP4 (ftyp, moov, and uuid with the mark); empty for other encodings."""
    if encoding != "fmp4":
        return b""
    frames = np.zeros((1, height, width, 3), np.uint8)
    mp4 = _mp4(frames, frame_rate_hz, quality or DEFAULT_QUALITY, 0, is_marked)
    return mp4[: _fragment_start(mp4)] + (XMP_BOX if is_marked else b"")


def set_picture_format(context: VideoCodecContext, height: int, width: int, frame_rate: int) -> None:
    """Configure an encoder for the frames of `to_video_frame`: 4:2:0, BT.709, limited range, labelled so."""
    context.height, context.width, context.pix_fmt = height, width, "yuv420p"
    context.time_base, context.framerate = Fraction(1, frame_rate), Fraction(frame_rate)
    context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
    context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709


def to_video_frame(image: NDArray[np.uint8], number: int, frame_rate: int) -> av.VideoFrame:
    """Convert an image (h, w, 3) to a video frame with timestamp number / frame_rate."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24").reformat(
        format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
    )
    frame.pts, frame.time_base = number, Fraction(1, frame_rate)
    return frame


def with_marks(packets: list[Packet], *, is_marked: bool) -> list[Packet]:
    """Return the packets of an MP4's video stream, key frames with their mark if is_marked."""
    return [_with_mark(packet) if is_marked and packet.is_keyframe else packet for packet in packets]


def _with_mark(packet: Packet) -> Packet:
    marked: Packet = av.Packet(mark_key_frame(bytes(packet)))
    marked.stream, marked.is_keyframe = packet.stream, True
    marked.pts, marked.dts, marked.duration = packet.pts, packet.dts, packet.duration
    marked.time_base = packet.time_base
    return marked


# The functions of ENCODINGS take arguments that some of them do not need.
# ruff: noqa: ARG001
def _rgb24(frames: Frames, frame_rate_hz: int, quality: int, first_frame: int, is_marked: bool) -> list[Encoded]:
    return [Encoded(frame.tobytes()) for frame in np.ascontiguousarray(frames)]


def _jpeg(frames: Frames, frame_rate_hz: int, quality: int, first_frame: int, is_marked: bool) -> list[Encoded]:
    encoded, metadata = [], {"xmp": XMP} if is_marked else {}
    for frame in frames:
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "JPEG", quality=quality, **metadata)
        encoded.append(Encoded(file.getvalue()))
    return encoded


def _h264(frames: Frames, frame_rate_hz: int, quality: int, first_frame: int, is_marked: bool) -> list[Encoded]:
    """Encode to access units in Annex B form, parameter sets before the key frame."""
    context = av.CodecContext.create("libx264", "w")
    _configure(context, frames, frame_rate_hz, quality)
    pictures = [to_video_frame(frame, i, frame_rate_hz) for i, frame in enumerate(frames)]
    packets = [packet for picture in [*pictures, None] for packet in context.encode(picture)]
    assert len(packets) == len(frames), "without look-ahead every frame gives a packet"
    encoded = [Encoded(bytes(packet), packet.is_keyframe) for packet in packets]
    return [replace(each, data=mark_key_frame(each.data)) if is_marked and each.is_key else each for each in encoded]


def _fmp4(frames: Frames, frame_rate_hz: int, quality: int, first_frame: int, is_marked: bool) -> list[Encoded]:
    """Encode to one fragment (moof and mdat) whose decode time is the number of its first frame."""
    mp4 = _mp4(frames, frame_rate_hz, quality, first_frame, is_marked)
    return [Encoded(mp4[_fragment_start(mp4) :], num_frames=len(frames))]


def _mp4(frames: Frames, frame_rate_hz: int, quality: int, first_frame: int, is_marked: bool) -> bytes:
    """Encode to an MP4 of an init segment and one fragment; the time unit is a frame."""
    file = io.BytesIO()
    scales = dict.fromkeys(("video_track_timescale", "movie_timescale"), str(frame_rate_hz))
    options = {**FRAGMENT, **scales, "fragment_index": str(first_frame + 1)}
    with av.open(file, "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=frame_rate_hz)
        _configure(stream.codec_context, frames, frame_rate_hz, quality)
        pictures = [to_video_frame(frame, number, frame_rate_hz) for number, frame in enumerate(frames, first_frame)]
        for picture in [*pictures, None]:
            container.mux(with_marks(stream.encode(picture), is_marked=is_marked))
    return file.getvalue()


def _configure(context: VideoCodecContext, frames: Frames, frame_rate_hz: int, quality: int) -> None:
    height, width = frames.shape[1:3]
    set_picture_format(context, height, width, frame_rate_hz)
    context.thread_count = 1
    crf = LOWEST_CRF + (HIGHEST_CRF - LOWEST_CRF) * (quality - 1) / 99
    context.options = {**X264, "crf": f"{crf:.1f}"}


def _fragment_start(mp4: bytes) -> int:
    """Return the offset of the moof box."""
    at = 0
    while mp4[at + 4 : at + 8] != b"moof":
        at += int.from_bytes(mp4[at : at + 4], "big")
    return at


# Encodings whose frames refer to earlier ones of their group.
GROUPED = ("h264", "fmp4")
# (frames, frame rate in Hz, quality 1 to 100, number of the first frame, with marks for machines) -> encoded frames.
ENCODINGS: dict[str, Callable[[Frames, int, int, int, bool], list[Encoded]]] = {
    "rgb24": _rgb24,
    "jpeg": _jpeg,
    "h264": _h264,
    "fmp4": _fmp4,
}
