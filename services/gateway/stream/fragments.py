"""Fragments of MP4, renumbered in place: the encoder counts the blocks that it makes, a client those that it is sent.

A fragment is boxes, each a size of 4 bytes, a name of 4, and content: `moof(mfhd(number), traf(tfdt(time)))`, `mdat`.
Source: ISO/IEC 14496-12, 4.2 (boxes), 8.8.5 (mfhd), 8.8.12 (tfdt).
"""

import struct

INSIDE = {b"moof", b"traf"}
HEADER = 8


def renumbered(fragment: bytes, frame: int) -> bytes:
    """The fragment as the one that begins with this frame; the time scale is the frame rate.

    ValueError if it is none, or its time has 32 bits.
    """
    data = bytearray(fragment)
    found = _renumber(data, 0, len(data), frame)
    if found != {b"mfhd", b"tfdt"}:
        raise ValueError(f"a fragment must have mfhd and tfdt once, found {sorted(found)}")
    return bytes(data)


def _renumber(data: bytearray, start: int, end: int, frame: int) -> set[bytes]:
    found: set[bytes] = set()
    while start < end:
        size, name = struct.unpack_from(">I4s", data, start) if end - start >= HEADER else (0, b"")
        if not HEADER <= size <= end - start:
            raise ValueError(f"a box of {size} bytes does not fit into {end - start}")
        if name in INSIDE:
            found |= _renumber(data, start + HEADER, start + size, frame)
        elif name == b"mfhd" and size >= HEADER + 8:
            struct.pack_into(">I", data, start + HEADER + 4, frame)
            found.add(name)
        elif name == b"tfdt":
            if data[start + HEADER] != 1 or size < HEADER + 12:
                raise ValueError("tfdt must be of version 1, with 64 bits of time")
            struct.pack_into(">Q", data, start + HEADER + 4, frame)
            found.add(name)
        start += size
    return found
