"""The bytes around the audio in a file: tags in front of it, files joined to it, and the end that its header declares.

FFmpeg reads the first of several joined files and ignores the others, or takes them for samples; it refuses a WAV file
behind a tag.
"""

import io
import re
from collections.abc import Iterator
from typing import BinaryIO

# The beginnings of files that may be joined. RIFX is WAV in big-endian order, which FFmpeg takes for little-endian.
WAVE = re.compile(rb"(?:RIFF|RF64|BW64)....WAVE", re.DOTALL)
RIFX = re.compile(rb"RIFX....WAVE", re.DOTALL)
WAVE64 = re.compile(rb"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb")
AIFF = re.compile(rb"FORM....AIF[FC]", re.DOTALL)
CAF = re.compile(rb"caff\x00\x01..desc", re.DOTALL)
AU = re.compile(rb"\.snd\x00\x00......\x00\x00\x00[\x01-\x1b]", re.DOTALL)
TTA = re.compile(rb"TTA1[\x01\x02]\x00.\x00[\x08\x10\x18]\x00", re.DOTALL)
FLAC = re.compile(rb"fLaC\x00\x00\x00\x22")
MP4 = re.compile(rb"\x00\x00\x00.ftyp(?:M4A|isom|iso.|mp4|qt)", re.DOTALL)
WEBM = re.compile(rb"\x1a\x45\xdf\xa3.{1,40}?\x42\x82.(?:webm|matroska)", re.DOTALL)
OGG = re.compile(rb"OggS\x00[\x02\x06]\x00{8}")
# The first packet of an MP3 file, up to the flags of its Xing header, which follows the side information: 32, 17 or 9
# bytes by the MPEG version and by stereo or mono.
MP3 = re.compile(
    rb"\xff(?:[\xfa\xfb].[\x00-\xbf].{32}|[\xfa\xfb].[\xc0-\xff].{17}|[\xe2\xe3\xf2\xf3].[\x00-\xbf].{17}"
    rb"|[\xe2\xe3\xf2\xf3].[\xc0-\xff].{9})(?:Xing|Info)\x00\x00\x00(.)",
    re.DOTALL,
)
# MP3 and AAC files of which no header tells.
FRAMES = re.compile(rb"\xff[\xe2-\xff][\x00-\xef]")
# Bytes to search for, and their offset from the file's beginning: scanning gigabytes for a pattern is slow.
MARKS = {
    WAVE: (b"WAVE", 8),
    RIFX: (b"RIFX", 0),
    WAVE64: (b"riff", 0),
    AIFF: (b"AIF", 8),
    CAF: (b"caff", 0),
    AU: (b".snd", 0),
    TTA: (b"TTA1", 0),
    FLAC: (b"fLaC", 0),
    MP4: (b"ftyp", 4),
    WEBM: (b"\x1a\x45\xdf\xa3", 0),
    OGG: (b"OggS", 0),
}
XING = (b"Xing", b"Info")
XING_OFFSETS = (13, 21, 36)
# Headers of other formats that are in these files, and no files of their own. In a WAV file of MP3 and in an Ogg file
# of FLAC they are so near to the beginning, and so near to each other are the first pages of an Ogg file's streams.
INNER = {MP4: (MP3,), WEBM: (MP3, FLAC)}
WAVE_FIRST_BYTES, OGG_FIRST_BYTES = 4096, 300
MAX_JOINED = 1000
# Bytes behind tags in which a WAV file is searched for, and bytes searched at a time.
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
        left = self.size - self._at
        if left <= 0:  # headers may lead to offsets that no file has
            return b""
        self._file.seek(self._start + self._at)
        data = self._file.read(left if size < 0 else min(size, left))
        self._at += len(data)
        return data

    def part(self, start: int, end: int) -> "Span":
        """Return bytes start .. end (exclusive) of this one."""
        return Span(self._file, self._start + start, self._start + end)


def joined_files(file: BinaryIO) -> list[Span]:
    """Return the files of which a file consists, without the tags in front of the first; most are one file."""
    size = file.seek(0, io.SEEK_END)
    whole = Span(file, 0, size)
    start = tags_end(whole)
    if start >= size:
        return [whole]
    whole.seek(start)
    head = whole.read(SEARCHED_BYTES)
    kinds = [(found, kind) for kind in [*MARKS, MP3, FRAMES] if (found := kind.match(head))]
    if not kinds and (found := WAVE.search(head)):
        kinds.append((found, WAVE))
    if not kinds:
        return [Span(file, start, size)]
    found, kind = kinds[0]
    starts = _beginnings(whole, kind, start + found.start())
    ends = [*starts[1:], size]
    spans = [Span(file, begin, end) for begin, end in zip(starts, ends, strict=True)]
    return [part for span in spans for part in _without_frames_behind(span)]


def _beginnings(file: Span, kind: re.Pattern[bytes], start: int) -> list[int]:
    """Return where files begin from `start` on, at which one of this kind does; at most MAX_JOINED of them."""
    starts, ogg_page = [start], start
    # A file that declares its end need not be searched.
    end = declared_end(file.part(start, file.size)) if kind in (WAVE, AIFF, MP4) else None
    search_start = start + (end if end and start + end <= file.size else 1)
    for at, found in _marks(file, search_start):
        is_inner = found in INNER.get(kind, ()) or (
            (kind is WAVE and found is MP3 and at < starts[-1] + WAVE_FIRST_BYTES)
            or (kind is OGG and found in (OGG, FLAC) and at < ogg_page + OGG_FIRST_BYTES)
        )
        ogg_page = at if found is OGG else ogg_page
        if not is_inner and len(starts) < MAX_JOINED:
            starts, kind = [*starts, at], found
    return starts


def _marks(file: Span, start: int) -> Iterator[tuple[int, re.Pattern[bytes]]]:
    """Yield the offsets from `start` on at which the beginning of a file is, in order, and its kind."""
    marks: list[tuple[bytes, tuple[int, ...], re.Pattern[bytes]]]
    marks = [(mark, (offset,), kind) for kind, (mark, offset) in MARKS.items()]
    marks += [(mark, XING_OFFSETS, MP3) for mark in XING]
    file.seek(start)
    data, base, done = file.read(READ_BYTES), start, start
    while data:
        found = set()
        for mark, offsets, kind in marks:
            at = data.find(mark)
            while at >= 0:
                for begin in [at - offset for offset in offsets if at >= offset]:
                    if base + begin >= done and kind.match(data, begin):
                        found.add((base + begin, kind))
                at = data.find(mark, at + 1)
        for beginning, kind in sorted(found, key=lambda each: each[0]):
            yield beginning, kind
            done = beginning + 1
        # The next piece begins with this one's end, in which a beginning may be cut in two.
        kept = data[-HEADER_BYTES:] if len(data) > HEADER_BYTES else b""
        base += len(data) - len(kept)
        more = file.read(READ_BYTES)
        data = kept + more if more else b""


def _without_frames_behind(span: Span) -> list[Span]:
    """Return a file, and the MP3 or AAC file without a header behind its declared end, if there is one."""
    end = None if begins(span, MP3) else declared_end(span)
    span.seek(0)
    if end is None:
        return [span]
    rest = span.part(end + end % 2 if begins(span, WAVE) else end, span.size)
    return [span.part(0, end), rest] if begins(rest, FRAMES) else [span]


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
    """Return the offset at which a WAV, AIFF, MP4, MP3 or Ogg file must end by its headers; None if unknown."""
    start = tags_end(file)
    file.seek(start)
    head = file.read(SEARCHED_BYTES)
    if WAVE.match(head):
        return _wave_end(file)
    if AIFF.match(head):
        size = int.from_bytes(head[4:8], "big")
        return 8 + size if 0 < size < UNKNOWN_BYTES else None
    if MP4.match(head):
        return _mp4_end(file)
    if head[:4] == b"OggS":
        return _ogg_end(file)
    if found := MP3.match(head):
        return _mp3_end(head, start, found)
    return None


def begins(file: Span, kind: re.Pattern[bytes]) -> bool:
    """Return True if a file of this kind begins here, after tags."""
    file.seek(tags_end(file))
    head = file.read(HEADER_BYTES)
    file.seek(0)
    return kind.match(head) is not None


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


def _mp4_end(file: Span) -> int | None:
    """Return the end of the last box, or of the last one before another file's."""
    at = 0
    while at < file.size:
        file.seek(at)
        head = file.read(16)
        size = int.from_bytes(head[:4], "big")
        if size == 1 and len(head) == 16:
            size = int.from_bytes(head[8:], "big")
        if size < 8 or not head[4:8].isalnum() or (at and head[4:8] == b"ftyp"):
            return at if size else None  # a box of size 0 lasts to the end
        at += size
    return at


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
