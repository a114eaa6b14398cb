"""The process that decodes one picture, within limits: `python -m avatar.vae.picture.decoder`.

    stdin: a line of JSON, the picture's bytes --> stdout: a line of JSON, the pixels' bytes

The request has `rule` (fields of PictureRule), `size` ([width, height], area or null) and `fit` (or null). The response
has `refusal`, or `shape` of the pixels ([h, w, 3]), `size` of the whole picture as it is shown ([width, height]), and
`num_faces`, `face_share` and `notice` as in Framing. `avatar.vae.picture.reading` starts the process and explains its
death. It loads no torch, and starts within 0.1 s; finding faces adds 0.15 s for most pictures.

Sizes are (width, height), in pixels.
"""

import contextlib
import io
import json
import math
import re
import resource
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from PIL import ExifTags, Image, ImageFile, JpegImagePlugin, PngImagePlugin, UnidentifiedImageError, WebPImagePlugin

from avatar.vae.face.crop import Framing, centre_crop, frame_centre, frame_face, reference_crop
from avatar.vae.picture.colour import over_white, plain_mode, to_srgb
from avatar.vae.picture.fitting import fit_crop, fit_image
from avatar.vae.picture.rule import Fit, PictureRule, Size, check_fit

# The plugins that are imported; Pillow imports all that it has when it is asked for another format.
FORMATS = tuple(
    plugin.format
    for plugin in (PngImagePlugin.PngImageFile, JpegImagePlugin.JpegImageFile, WebPImagePlugin.WebPImageFile)
)
NAMES = "PNG, JPEG, WebP, HEIC or AVIF"
# Brands of HEIC and AVIF, of which a file's first box names one. Source: ISO 23008-12, and AVIF of AOMedia.
BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"avif", b"avis", b"mif1", b"msf1")
MIN_SIDE = 16
MAX_SIDE = 16384
MAX_PIXELS = 50_000_000
MAX_SCANS = 100
# Pictures with more pixels are halved before anything else: a phone's 48 megapixels cost as much as its usual 12.
HALVED_PIXELS = 16_000_000
# Rows that must be there of a PNG or JPEG whose file is cut short, as a part of all.
MIN_ROWS = 0.9
DAMAGED = "damaged or cut short; send the whole file, or save it again"
INCOMPLETE = (
    "The file is cut short or damaged, so a part of the picture may be missing or blurred. Send the whole file."
)

# Limits of the process. Measured at 48 megapixels: 1.8 s for the slowest file (HEIC of noise), 800 MB for the largest
# (WebP, whose decoder keeps four copies).
CPU_S = 4
MEMORY_BYTES = 1 << 30
# Threads of the slow decoders, of HEIC and AVIF.
THREADS = 2

# A marker of JPEG: not a stuffed zero, and not one of the restart markers within a scan.
MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9
# Values of all channels where data is missing: mid-grey in a JPEG (127 of inverted CMYK), in a PNG as it was allocated.
MISSING = {"JPEG": (127, 128), "MPO": (127, 128), "PNG": (0,)}
LONE_MARKERS = (0x01, 0xD8)

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
QUARTER_TURNS = (5, 6, 7, 8)


@dataclass(frozen=True)
class Decoded:
    """A decoded picture.

    image: mode RGB, of the video's size. size: of the whole picture as it is shown, before it was fitted. framing: the
    faces in it.
    """

    image: Image.Image
    size: Size
    framing: Framing


def main() -> None:
    """Read a request and a picture from stdin, and write the response to stdout."""
    set_limits()
    request = json.loads(sys.stdin.buffer.readline())
    respond(request, sys.stdin.buffer.read(), sys.stdout.buffer)


def set_limits() -> None:
    """Limit this process for good: processor time, memory, and no files; let the kernel end it before any other."""
    with contextlib.suppress(OSError):  # where there is no such file, the kernel has no such choice
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    for limit, value in (
        (resource.RLIMIT_CPU, CPU_S),
        (resource.RLIMIT_DATA, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))


def respond(request: dict[str, Any], data: bytes, out: BinaryIO) -> None:
    """Write the response to a request."""
    size = request["size"]
    try:
        decoded = decode(
            data, PictureRule(**request["rule"]), tuple(size) if isinstance(size, list) else size, request["fit"]
        )
    except ValueError as error:
        out.write(json.dumps({"refusal": str(error)}).encode() + b"\n")
        return
    width, height = decoded.image.size
    response = {"shape": [height, width, 3], "size": decoded.size}
    faces = {name: getattr(decoded.framing, name) for name in ("num_faces", "face_share", "notice")}
    out.write(json.dumps({**response, **faces}).encode() + b"\n")
    out.write(decoded.image.tobytes())


def decode(data: bytes, rule: PictureRule, size: Size | int | None = None, fit: Fit | None = None) -> Decoded:
    """Decode a picture in this process, without its limits. Arguments and ValueError as of `reading.read_picture`."""
    fit = fit or rule.fit
    check_fit(fit)
    if packed_size := webp_size(data):
        check_size(*packed_size)  # Pillow takes memory for all pixels of a WebP when it opens it
    with pillow_errors():
        image = open_file(data)
    check_size(*image.size)
    if image.format in ("JPEG", "MPO"):
        check_scans(data)
    shown_size: Size = image.size
    with pillow_errors():
        image, is_whole = load(image, data)
    if not is_whole:
        check_rows(image)
    with pillow_errors():
        turn, profile = orientation(image), image.info.get("icc_profile")
        image = plain_mode(image)
        if math.prod(image.size) > HALVED_PIXELS:
            image = image.reduce(2)
        if fit == "reference":
            image, profile = image.convert("RGB"), None
        else:
            if turn in TURNS:
                image = image.transpose(TURNS[turn])
            if turn in QUARTER_TURNS:
                shown_size = shown_size[::-1]
            image = over_white(image)
    video_size = rule.video_size(shown_size, size)
    with pillow_errors():
        # Profiles apply to the few pixels that remain, as they take long; without one there is nothing to wait for.
        image = image if profile else image.convert("RGB")
    framing = frame(image, video_size, fit)  # if it fails, the picture is not to blame
    if not is_whole:
        framing = replace(framing, notice=f"{INCOMPLETE} {framing.notice}".strip())
    crop = framing.crop
    with pillow_errors():
        fitted = fit_image(image, video_size, fit) if crop is None else fit_crop(image, video_size, crop)
        return Decoded(to_srgb(fitted, profile), shown_size, framing)


def frame(image: Image.Image, video_size: Size, fit: Fit) -> Framing:
    """Find the faces in an image of mode RGB, L or CMYK, and frame it for a video."""
    from avatar.vae.face.detector import find_faces  # imports numpy, which takes longer than most pictures to decode

    faces = find_faces(image)
    if fit == "face":
        return frame_face(faces, image.size, video_size)
    shown = reference_crop(image.size, video_size) if fit == "reference" else centre_crop(image.size, video_size)
    return frame_centre(faces, image.size, shown)


def open_file(data: bytes) -> Image.Image:
    """Return the image of a file of an accepted format, with its header read and nothing decoded."""
    if data[4:8] == b"ftyp" and data[8:12] in BRANDS:
        from pi_heif import register_heif_opener
        from PIL import AvifImagePlugin

        AvifImagePlugin.DEFAULT_MAX_THREADS = THREADS
        register_heif_opener(decode_threads=THREADS, thumbnails=False, depth_images=False, aux_images=False)
        try:
            return Image.open(io.BytesIO(data), formats=("AVIF", "HEIF"))
        except UnidentifiedImageError as error:
            raise ValueError(DAMAGED) from error
    with incomplete_files():  # also passes over texts and profiles that unpack to too much
        return Image.open(io.BytesIO(data), formats=FORMATS)


@contextlib.contextmanager
def incomplete_files() -> Iterator[None]:
    """Let Pillow take what there is of a PNG."""
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False


def load(image: Image.Image, data: bytes) -> tuple[Image.Image, bool]:
    """Return an image with its pixels decoded, and False if its file's end is missing or damaged.

    image: of the file `data`. Of a PNG or JPEG that has no end, what is there is decoded, as
    browsers do; other formats raise Pillow's errors.
    """
    try:
        load_pixels(image)
        return image, True
    except Exception as error:
        if image.format not in MISSING:
            raise
        is_whole = image.format == "PNG" and isinstance(error, ValueError)  # only a text behind the pixels is bad
    if image.format == "PNG":
        image = open_file(data)
        with incomplete_files():
            load_pixels(image)
    else:
        image = open_file(data + bytes((0xFF, END_OF_IMAGE)))
        load_pixels(image)
    return image, is_whole


def load_pixels(image: Image.Image) -> None:
    """Decode an image's pixels, half of them in width and height if it is a large JPEG."""
    if math.prod(image.size) > HALVED_PIXELS:
        image.draft(None, (image.width // 2, image.height // 2))  # only JPEG has a decoder that halves
    image.load()


def check_rows(image: Image.Image) -> None:
    """Raise ValueError if more of an incomplete file is missing than its lowest rows: they are of a single colour then.

    image: as decoded from a PNG or JPEG. An interlaced PNG has no row before its end.
    """
    lowest = image.crop((0, math.floor(image.height * MIN_ROWS), image.width, image.height))
    values = {value for channel in lowest.split() for value in channel.getextrema()}
    if values <= set(MISSING[image.format or ""]) or image.info.get("interlace"):
        raise ValueError(DAMAGED)


def webp_size(data: bytes) -> Size | None:
    """Return the size in a WebP's header; None if the file is none.

    Source: RFC 9649, sections 2.5 to 2.7.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None

    def number(start: int, end: int) -> int:
        return int.from_bytes(data[start:end], "little")

    match data[12:16]:
        case b"VP8 ":
            return number(26, 28) & 0x3FFF, number(28, 30) & 0x3FFF
        case b"VP8L":
            return (number(21, 25) & 0x3FFF) + 1, (number(21, 25) >> 14 & 0x3FFF) + 1
        case b"VP8X":
            return number(24, 27) + 1, number(27, 30) + 1
    return None


def check_size(width: int, height: int) -> None:
    """Raise ValueError unless pictures of this size are accepted."""
    if min(width, height) < MIN_SIDE:
        raise ValueError(f"too small: {width}x{height}, expected at least {MIN_SIDE} pixels a side")
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"too large: {width}x{height}, expected at most {MAX_SIDE} pixels a side")
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"too large: {width}x{height} are {width * height / 1e6:.1f} megapixels, at most"
            f" {MAX_PIXELS // 10**6} are accepted"
        )


def check_scans(data: bytes) -> None:
    """Raise ValueError if a JPEG has more than MAX_SCANS scans: each costs time for all pixels, and hardly any bytes.

    Source: the markers of ITU-T T.81, annex B.
    """
    position, num_scans = 0, 0
    while found := MARKER.search(data, position):
        marker, position = found[1][0], found.end()
        if marker == END_OF_IMAGE:
            return
        if marker in LONE_MARKERS:
            continue
        if marker == START_OF_SCAN:
            num_scans += 1
        if num_scans > MAX_SCANS:
            raise ValueError(f"more than {MAX_SCANS} scans, which take too long to decode; save it as an ordinary JPEG")
        position += int.from_bytes(data[position : position + 2])


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if the image has none, or metadata that cannot be read."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # of many kinds, as on damaged pixels; the pixels are good
        return 1


@contextlib.contextmanager
def pillow_errors() -> Iterator[None]:
    """Turn Pillow's errors into ValueError, and silence its warnings about odd metadata."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except UnidentifiedImageError as error:
            raise ValueError(f"not a {NAMES} picture; send the bytes of such a file") from error
        except Image.DecompressionBombError as error:
            raise ValueError(f"too large: at most {MAX_PIXELS // 10**6} megapixels are accepted") from error
        except MemoryError as error:
            raise ValueError(
                f"too large: it needs more than {MEMORY_BYTES >> 20} MiB of memory to decode; send a smaller one"
            ) from error
        except Exception as error:
            # Decoders raise many exceptions on damaged data: OSError, SyntaxError, struct.error and others.
            raise ValueError(DAMAGED) from error


if __name__ == "__main__":
    main()
