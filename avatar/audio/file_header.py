"""The bytes around the audio in a file: tags in front of it, files joined to it, and the end that its header declares.

FFmpeg reads the first of several joined WAV, AIFF, FLAC, MP4 or WebM files, and refuses a WAV file behind a tag. It
continues through joined MP3, AAC and Ogg files by itself.
"""

import io
import re
from typing import BinaryIO

# The beginnings of files that end where another begins.
WAVE = re.compile(rb"(?:RIFF|RF64|BW64)....WAVE", re.DOTALL)
AIFF = re.compile(rb"FORM....AIF[FC]", re.DOTALL)
FLAC = re.compile(rb"fLaC\x00\x00\x00\x22")
MP4 = re.compile(rb"\x00\x00\x00.ftyp(?:M4A|isom|iso.|mp4|qt)", re.DOTALL)
WEBM = re.compile(rb"\x1a\x45\xdf\xa3.{1,40}?\x42\x82.(?:webm|matroska)", re.DOTALL)
# The first packet of an MP3 file, up to the flags of its Xing header.
MP3 = re.compile(rb"\xff[\xe0-\xff].{8,64}?(?:Xing|Info)\x00\x00\x00(.)", re.DOTALL)
# What to search for, and how far after the file's beginning it is: scanning gigabytes for a pattern is slow.
MARKS = {WAVE: (b"WAVE", 8), AIFF: (b"AIF", 8), FLAC: (b"fLaC", 0), MP4: (b"ftyp", 4), WEBM: (b"\x1a\x45\xdf\xa3", 0)}
MAX_JOINED = 1000
# How far behind tags a WAV file is searched for, and how much is searched at a time.
SEARCHED_BYTES, READ_BYTES = 1 << 16, 1 << 20
HEADER_BYTES = 64
# Programs that stream WAV do not know its length, and write 0 or a number near one of these.
UNKNOWN_BYTES = 0x7FFF0000
ID3_BYTES, APE_BYTES = 10, 32
OGG_PAGE_BYTES = 27 + 255 + 255 * 255


class Span(io.RawIOBase):
    """Bytes start .. end (exclusive) of a file, as a file of their own."""

    def __init__(self, file: BinaryIO, start: int, end: int) -> None:
        super().__init__()
        self._file, self._start, self.size = file, start, end - start
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise OSError(f"cannot seek to {base + offset}")
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.size - self._at)
        self._file.seek(self._start + self._at)
        data = self._file.read(left if size < 0 else min(size, left))
        self._at += len(data)
        return data


def joined_files(file: BinaryIO) -> list[Span]:
    """Return the files of which a file consists, without the tags in front of the first; most are one file."""
    size = file.seek(0, io.SEEK_END)
    whole = Span(file, 0, size)
    start = tags_end(whole)
    if start >= size:
        return [whole]
    whole.seek(start)
    head = whole.read(SEARCHED_BYTES)
    kinds = [(found, kind) for kind in (AIFF, FLAC, MP4, WEBM) if (found := kind.match(head))]
    if found := WAVE.search(head):
        kinds.append((found, WAVE))
    if not kinds:
        return [Span(file, start, size)]
    (first, kind) = kinds[0]
    starts = [start + first.start(), *_beginnings(whole, kind, start + first.end())]
    ends = [*starts[1:], size]
    return [Span(file, begin, end) for begin, end in zip(starts, ends, strict=True)]


def _beginnings(file: Span, kind: re.Pattern[bytes], start: int) -> list[int]:
    """Return where files of a kind begin after `start`, at most MAX_JOINED of them."""
    mark, offset = MARKS[kind]
    found: list[int] = []
    file.seek(start)
    data, base = file.read(READ_BYTES), start
    while data:
        at = data.find(mark, offset)
        while at >= 0 and len(found) < MAX_JOINED:
            if kind.match(data, at - offset):
                found.append(base + at - offset)
            at = data.find(mark, at + 1)
        # The next piece begins with this one's end, in which a beginning may be cut in two.
        kept = data[-HEADER_BYTES:] if len(data) > HEADER_BYTES else b""
        base += len(data) - len(kept)
        more = file.read(READ_BYTES)
        data = kept + more if more else b""
    return sorted(set(found))


def tags_end(file: Span) -> int:
    """Return where the ID3v2 and APEv2 tags in front of a file end, 0 if it has none."""
    at = 0
    while True:
        file.seek(at)
        head = file.read(APE_BYTES)
        if head[:3] == b"ID3" and len(head) >= ID3_BYTES:
            # The size has seven bits a byte; a flag tells of a footer as long as the header.
            size = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
            at += size + ID3_BYTES * (2 if head[5] & 0x10 else 1)
        elif head[:8] == b"APETAGEX" and len(head) == APE_BYTES:
            at += APE_BYTES + int.from_bytes(head[12:16], "little")
        else:
            return at


def declared_end(file: Span) -> int | None:
    """Return the offset at which the audio must end by the headers of a WAV, AIFF, MP3 or Ogg file; None if unknown."""
    start = tags_end(file)
    file.seek(start)
    head = file.read(SEARCHED_BYTES)
    if WAVE.match(head):
        return _wave_end(file)
    if AIFF.match(head):
        size = int.from_bytes(head[4:8], "big")
        return 8 + size if 0 < size < UNKNOWN_BYTES else None
    if head[:4] == b"OggS":
        return _ogg_end(file)
    if found := MP3.match(head):
        return _mp3_end(head, start, found)
    return None


def is_mp4(file: Span) -> bool:
    """Return True if an MP4 file begins here."""
    file.seek(0)
    return MP4.match(file.read(HEADER_BYTES)) is not None


def _wave_end(file: Span) -> int | None:
    at = 12
    while True:
        file.seek(at)
        head = file.read(8)
        if len(head) < 8:
            return None
        size = int.from_bytes(head[4:], "little")
        if head[:4] == b"data":
            return at + 8 + size if 0 < size < UNKNOWN_BYTES else None
        at += 8 + size + size % 2


def _mp3_end(head: bytes, start: int, found: re.Match[bytes]) -> int | None:
    """Return the end by the Xing header: flags say which of the numbers of frames and bytes follow."""
    flags = found[1][0]
    at = found.end() + (4 if flags & 1 else 0)
    num_bytes = int.from_bytes(head[at : at + 4], "big")
    return start + num_bytes if flags & 2 and num_bytes else None


def _ogg_end(file: Span) -> int | None:
    """Return the end of the last page, whose length is in its table of segments."""
    start = max(0, file.size - OGG_PAGE_BYTES)
    file.seek(start)
    tail = file.read()
    at = tail.rfind(b"OggS")
    if at < 0 or at + 27 > len(tail):
        return None
    segments = tail[at + 27 : at + 27 + tail[at + 26]]
    return start + at + 27 + tail[at + 26] + sum(segments)
