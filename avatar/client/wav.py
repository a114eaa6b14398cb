"""WAV files as the audio of a stream: any PCM width, floats, A-law and mu-law become mono PCM16.

Needs the standard library alone. Sources: the RIFF and WAVE specifications of Microsoft and IBM, RFC 2361 for format
tags, EBU Tech 3306 for RF64, and ITU-T G.711 for A-law and mu-law.
"""

import math
import re
import struct
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import add, floordiv, mul, rshift
from os import PathLike, fspath
from pathlib import Path
from typing import TypeAlias, cast

Samples: TypeAlias = "array[int] | array[float]"

MIN_RATE_HZ, MAX_RATE_HZ = 8000, 48000  # of a stream
MAX_FILE_RATE_HZ = 768_000
# Tags, such as ID3, may lie in front of the file's own header.
MAX_TAG_BYTES = 16 << 20
HEADER = re.compile(rb"(?:RIFF|RF64|BW64)....WAVE", re.DOTALL)
# The header of a chunk that may follow an empty `data` chunk.
CHUNK = re.compile(rb"LIST|id3 |ID3 |fact|cue |bext|iXML|smpl|PEAK|fmt ")
# Stereo whose channels cancel each other has lost its speech when the mix is this much weaker than a channel.
MAX_MIX_LOSS_DB = 12.0
ENERGY_SAMPLES = 500_000

PCM, FLOAT, A_LAW, MU_LAW, EXTENSIBLE = 1, 3, 6, 7, 0xFFFE
# The end of an extensible format's identifier whose start is one of the tags above.
EXTENSIBLE_TAIL = bytes.fromhex("000000001000800000aa00389b71")
COMPRESSED = {
    0x02: "Microsoft ADPCM",
    0x11: "IMA ADPCM",
    0x31: "GSM 6.10",
    0x45: "G.726 ADPCM",
    0x50: "MPEG layer 2",
    0x55: "MP3",
    0xFF: "AAC",
    0x161: "Windows Media Audio",
    0x1600: "AAC",
    0x2000: "AC-3",
    0x674F: "Vorbis",
    0x704F: "Opus",
    0xF1AC: "FLAC",
}
CONVERT = "convert it, such as by `ffmpeg -i FILE -ar 16000 -c:a pcm_s16le OUT.wav`"
OTHERS = {
    b"fLaC": f"FLAC; {CONVERT}",
    b"OggS": f"Ogg; {CONVERT}",
    b"FORM": f"AIFF; {CONVERT}",
    b"caff": f"CAF; {CONVERT}",
    b"riff": f"Wave64; {CONVERT}",
    b"RIFX": f"big-endian RIFX; {CONVERT}",
    b"ID3": f"MP3; {CONVERT}",
    b"\xff\xfb": f"MP3; {CONVERT}",
    b"\xff\xf3": f"MP3; {CONVERT}",
    b"\xff\xf1": f"AAC; {CONVERT}",
    b"\xff\xf9": f"AAC; {CONVERT}",
    b"#!AMR": f"AMR; {CONVERT}",
    b".snd": f"AU; {CONVERT}",
    b"\x1aE\xdf\xa3": f"WebM or Matroska; {CONVERT}",
    b"\x89PNG": "a PNG picture; pass a file of speech",
    b"\xff\xd8": "a JPEG picture; pass a file of speech",
    b"<": "HTML or XML; download the file itself",
    b"version https://git-lfs": "a git-lfs pointer; fetch the file by `git lfs pull`",
}


UNKNOWN = f"an unknown format; if it has audio, {CONVERT}"


@dataclass(frozen=True)
class WavFormat:
    """The content of a `fmt ` chunk. width: bytes of a sample of one channel."""

    tag: int
    num_channels: int
    rate_hz: int
    width: int


def read_wav(source: bytes | str | PathLike[str]) -> tuple[bytes, int]:
    """Return a WAV file's audio as mono PCM16, little-endian, and its sample rate, in Hz, that a stream takes.

    source: the bytes or the path of a file of PCM of any width, 32 or 64-bit floats, A-law or mu-law. Channels are
    mixed; if they cancel each other, the loudest one is taken. Rates over 48 kHz are halved until they fit. A file
    that is cut short gives what it has. Raises ValueError for any other file.
    """
    if isinstance(source, bytes):
        name, data = "the file", source
    else:
        name, data = fspath(source), Path(source).read_bytes()
    try:
        return _read(data)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None


def _read(data: bytes) -> tuple[bytes, int]:
    """Return the audio. Raises ValueError with a reason that continues the file's name."""
    if not data:
        raise ValueError("is empty: it has no bytes")
    header = HEADER.search(data, 0, MAX_TAG_BYTES)
    if header is None:
        kind = next((kind for start, kind in OTHERS.items() if data.startswith(start)), UNKNOWN)
        kind = f"MP4 or M4A; {CONVERT}" if data[4:8] == b"ftyp" else kind
        raise ValueError(f"is no WAV file, but {kind}")
    wav_format, sound = _chunks(data, header)
    channels = _channels(wav_format, sound)
    if not channels[0]:
        raise ValueError("contains no audio")
    samples, rate_hz = _pcm16(_mix(channels)), wav_format.rate_hz
    while rate_hz > MAX_RATE_HZ:
        samples, rate_hz = _halve(samples), rate_hz // 2
    return _little_endian(samples).tobytes(), rate_hz


def _chunks(data: bytes, header: re.Match[bytes]) -> tuple[WavFormat, bytes]:
    """Return the format, and the bytes of the `data` chunk."""
    position, data_bytes = header.end(), 0
    wav_format: WavFormat | None = None
    sound: bytes | None = None
    while position + 8 <= len(data) and not (wav_format and sound is not None):
        kind, size = struct.unpack_from("<4sI", data, position)
        position += 8
        left = len(data) - position
        if kind == b"ds64" and left >= 16:  # RF64: sizes over 4 GiB
            (data_bytes,) = struct.unpack_from("<Q", data, position + 8)
        elif kind == b"fmt ":
            wav_format = _format(data[position : position + size])
        elif kind == b"data":
            # A program that streams a file does not know its size when it writes the header.
            is_streamed = size == 0 and CHUNK.match(data, position) is None
            if size == 0xFFFFFFFF and 0 < data_bytes <= left:
                size = data_bytes
            elif is_streamed or size > left:
                size = left
            sound = data[position : position + size]
        position += size
        # Chunks start at even offsets; some programs omit the padding.
        if size % 2 and data[position : position + 4] not in (b"data", b"fmt "):
            position += 1
    if wav_format is None or sound is None:
        raise ValueError("is a damaged WAV file: it has no `fmt ` or no `data` chunk")
    return wav_format, sound


def _format(chunk: bytes) -> WavFormat:
    """Parse a `fmt ` chunk."""
    if len(chunk) < 16:
        raise ValueError(f"is a damaged WAV file: its `fmt ` chunk has {len(chunk)} bytes instead of 16")
    tag, num_channels, rate_hz, _, frame_bytes, bits = struct.unpack_from("<HHIIHH", chunk)
    if tag == EXTENSIBLE:
        if chunk[26:40] != EXTENSIBLE_TAIL:
            raise ValueError("is a WAV file in an unknown extensible format")
        (tag,) = struct.unpack_from("<H", chunk, 24)
    if tag not in (PCM, FLOAT, A_LAW, MU_LAW):
        codec = COMPRESSED.get(tag, f"format tag {tag:#06x}")
        raise ValueError(f"is compressed ({codec}), and only PCM can be read; {CONVERT}")
    if not num_channels:
        raise ValueError("is a damaged WAV file: it has no channels")
    if not MIN_RATE_HZ <= rate_hz <= MAX_FILE_RATE_HZ:
        raise ValueError(f"has a sample rate of {rate_hz} Hz; a stream takes {MIN_RATE_HZ} Hz or more; {CONVERT}")
    # Samples of 12 or 20 bits fill the upper bits of whole bytes, and 24 bits may lie in 32.
    width = 1 if tag in _G711 else max(frame_bytes // num_channels, math.ceil(bits / 8))
    if not (1 <= width <= 8 if tag != FLOAT else width in (4, 8)):
        raise ValueError(f"has samples of {8 * width} bits, which its format does not allow; {CONVERT}")
    return WavFormat(tag, num_channels, rate_hz, width)


def _channels(wav_format: WavFormat, sound: bytes) -> list[Samples]:
    """Return the samples of each channel: integers of 16 bits, or floats whose full scale is 1."""
    width, num_channels = wav_format.width, wav_format.num_channels
    sound = sound[: len(sound) // (width * num_channels) * width * num_channels]
    if wav_format.tag == FLOAT:
        floats = array("f" if width == 4 else "d", sound)
        samples: Samples = _little_endian(floats)
    else:
        pcm16 = bytearray(2 * (len(sound) // width))
        pcm16[::2], pcm16[1::2] = _low_and_high_bytes(wav_format, sound)
        samples = _little_endian(array("h", bytes(pcm16)))
    return [samples[channel::num_channels] for channel in range(num_channels)]


def _low_and_high_bytes(wav_format: WavFormat, sound: bytes) -> tuple[bytes, bytes]:
    """Return the bytes of all samples as little-endian PCM16. Works on whole files at once, without a loop."""
    width = wav_format.width
    if width > 1:
        return sound[width - 2 :: width], sound[width - 1 :: width]
    values = [_G711[wav_format.tag](code) if wav_format.tag != PCM else (code - 128) << 8 for code in range(256)]
    low, high = (bytes((value >> shift) & 0xFF for value in values) for shift in (0, 8))
    return sound.translate(low), sound.translate(high)


def _from_mu_law(code: int) -> int:
    """Return a mu-law code's value in 16 bits. Source: ITU-T G.711, table 2a."""
    code = ~code & 0xFF
    magnitude = (((code & 0x0F) << 3) + 0x84 << ((code & 0x70) >> 4)) - 0x84
    return -magnitude if code & 0x80 else magnitude


def _from_a_law(code: int) -> int:
    """Return an A-law code's value in 16 bits. Source: ITU-T G.711, table 1a."""
    code ^= 0x55
    exponent, mantissa = (code & 0x70) >> 4, (code & 0x0F) << 4
    magnitude = mantissa + 8 if exponent == 0 else mantissa + 0x108 << exponent - 1
    return magnitude if code & 0x80 else -magnitude


_G711 = {A_LAW: _from_a_law, MU_LAW: _from_mu_law}


def _mix(channels: list[Samples]) -> Samples:
    """Return the mean of the channels, or the loudest one if they cancel each other."""
    channels = [_finite(each) for each in channels]
    if len(channels) == 1:
        return channels[0]
    total: Iterator[float] = iter(channels[0])
    for each in channels[1:]:
        total = map(add, total, each)
    typecode, count = channels[0].typecode, len(channels)
    mean = map(floordiv, total, repeat(count)) if typecode == "h" else map(mul, total, repeat(1 / count))
    mix: Samples = array(typecode, mean)
    loudest = max(channels, key=_energy)
    return loudest if _energy(mix) < _energy(loudest) / 10 ** (MAX_MIX_LOSS_DB / 10) else mix


def _energy(samples: Samples) -> float:
    """Return the sum of squares, of a part of the samples in a long file."""
    part = samples[:: max(1, len(samples) // ENERGY_SAMPLES)]
    return float(sum(map(mul, part, part)))


def _finite(samples: Samples) -> Samples:
    """Return samples with silence in place of NaN and infinity."""
    if samples.typecode == "h" or math.isfinite(sum(samples)):
        return samples
    return array(samples.typecode, [each if math.isfinite(each) else 0.0 for each in samples])


def _pcm16(samples: Samples) -> "array[int]":
    """Return samples as PCM16; floats beyond full scale are clipped."""
    if samples.typecode == "h":
        return cast("array[int]", samples)
    scaled: Sequence[float] = array("d", map(mul, samples, repeat(32767.0)))
    if max(scaled) > 32767 or min(scaled) < -32768:
        scaled = [max(-32768.0, min(32767.0, each)) for each in scaled]
    return array("h", map(round, scaled))


def _halve(samples: "array[int]") -> "array[int]":
    """Return samples at half the rate, after a filter of [1, 2, 1] / 4 against aliasing."""
    even, odd = samples[::2], samples[1::2]
    before = array("h", [0]) + odd
    if len(odd) < len(even):
        odd.append(0)
    total = map(add, map(add, even, even), map(add, before, odd))
    return array("h", map(rshift, total, repeat(2)))


def _little_endian(samples: Samples) -> Samples:
    """Convert samples between this machine's byte order and the file's."""
    if sys.byteorder == "big":
        samples.byteswap()
    return samples
