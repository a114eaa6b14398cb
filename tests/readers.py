"""Readers of the marks in frames and films, by Pillow and by FFmpeg's libraries: none of our code."""

import io
from pathlib import Path
from xml.etree import ElementTree

import av
from av.sidedata.sidedata import Type
from PIL import Image

GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
PROPERTY = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
XMP_UUID = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")


def source_type(packet: bytes) -> str:
    """Return the IPTC property DigitalSourceType of an XMP packet."""
    (description,) = ElementTree.fromstring(packet).iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
    return description.attrib[PROPERTY]


def mark_of_jpeg(data: bytes) -> str | None:
    """Return the source type in a JPEG file, read by Pillow; None if there is none."""
    with Image.open(io.BytesIO(data)) as image:
        return source_type(image.info["xmp"]) if "xmp" in image.info else None


def marks_of_film(film: bytes | Path, kind: str | None = None) -> tuple[str | None, list[str | None]]:
    """Return the source types in a film's metadata and in each of its key frames, read by FFmpeg.

    kind: FFmpeg's name of the format; None: by the film's content.
    """
    file = str(film) if isinstance(film, Path) else io.BytesIO(film)
    with av.open(file, "r", format=kind, options={"export_xmp": "1"} if kind != "h264" else {}) as container:
        packet = container.metadata.get("xmp")
        frames = [_user_data(frame) for frame in container.decode(video=0) if frame.key_frame]
    return source_type(packet.encode()) if packet else None, frames


def _user_data(frame: av.VideoFrame) -> str | None:
    """Return the source type in a frame's first SEI message, if it has XMP's UUID; None if it has none."""
    message = frame.side_data.get(Type.SEI_UNREGISTERED)  # type: ignore[call-overload]
    data = bytes(message) if message else b""
    return source_type(data[16:]) if data.startswith(XMP_UUID) else None
