"""Picture files that tests make."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# Both 64x48, as no package of ours writes HEIC: `photo`; and pixels of (150, 130, 110) with test_colour's wide profile.
HEIC_PHOTO, HEIC_WIDE_GAMUT = (
    Path(__file__).with_name(f"{name}.heic").read_bytes() for name in ("photo", "wide_gamut")
)


def photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Red grows to the right, green downwards, blue is a checkerboard."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    blue = (np.arange(width) // 4 + np.arange(height)[:, None] // 4) % 2 * 255
    return Image.fromarray(np.stack([x, y, blue], axis=2).astype(np.uint8)).convert(mode)


def noise() -> Image.Image:
    """Return a picture whose rows all take as many bytes in a file."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (160, 192, 3), dtype=np.uint8))


def interlaced(image: Image.Image) -> bytes:
    """Return an RGB image as an interlaced PNG (Adam7), which Pillow does not write."""
    values = np.asarray(image)
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = [row for y, x, dy, dx in passes for row in values[y::dy, x::dx]]
    header = struct.pack(">IIBBBBB", image.width, image.height, 8, 2, 0, 0, 1)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        png_chunk(name, part) for name, part in ((b"IHDR", header), (b"IDAT", body), (b"IEND", b""))
    )


def file(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def png_header(width: int, height: int) -> bytes:
    """Return a PNG whose header claims a size, with hardly any pixels."""

    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    rows = png_chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + header + rows + png_chunk(b"IEND", b"")


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def webp_header(width: int, height: int) -> bytes:
    """Return a WebP whose header claims a size, without pixels."""
    body = b"WEBP" + b"VP8X" + struct.pack("<II", 10, 0) + (width - 1).to_bytes(3, "little")
    body += (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", len(body)) + body


def progressive_jpeg(width: int, height: int, num_scans: int) -> bytes:
    """Return a grey progressive JPEG of so many scans: the first has the blocks' means, the others change nothing.

    One code stands for 16384 to 32767 blocks without a change, so that a scan of any size has a few bytes.
    """
    num_blocks = -(-width // 8) * -(-height // 8)

    def segment(marker: int, body: bytes) -> bytes:
        return bytes((0xFF, marker)) + struct.pack(">H", 2 + len(body)) + body

    def table(kind: int, symbol: int) -> bytes:
        """Return a Huffman table with one code, `0`."""
        return segment(0xC4, bytes([kind, 1, *[0] * 15, symbol]))

    def scan(first: int, last: int, bits: str) -> bytes:
        """Return a scan of coefficients first..last; the rest of its last byte is filled with ones."""
        bits += "1" * (-len(bits) % 8)
        packed = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
        return segment(0xDA, bytes((1, 1, 0, first, last, 0))) + packed

    runs, left = "", num_blocks
    while left > 0:
        run = max(1 << 14, min(left, (1 << 15) - 1))
        runs, left = f"{runs}0{run - (1 << 14):014b}", left - run
    return b"".join(
        (
            b"\xff\xd8",
            segment(0xDB, bytes([0, *[1] * 64])),
            segment(0xC2, struct.pack(">BHHB", 8, height, width, 1) + bytes((1, 0x11, 0))),
            table(0x00, 0x00),
            table(0x10, 0xE0),
            scan(0, 0, "0" * num_blocks),
            scan(1, 63, runs) * (num_scans - 1),
            b"\xff\xd9",
        )
    )


def with_packed_text(num_bytes: int) -> bytes:
    """Return a PNG with a text that unpacks to so many bytes."""
    data = file(photo(64, 48))
    at = data.index(b"IDAT") - 4
    return data[:at] + png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(num_bytes), 1)) + data[at:]


def with_empty_segments(count: int) -> bytes:
    """Return a JPEG whose header has so many comments without a letter."""
    data = file(photo(64, 48), "JPEG")
    return data[:2] + b"\xff\xfe\0\2" * count + data[2:]


def pixels_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image))
