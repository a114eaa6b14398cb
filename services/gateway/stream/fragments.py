"""MP4 fragments, renumbered in place: the encoder numbers the blocks that it makes, a client the ones it receives.

A fragment consists of boxes, each with a size of 4 bytes, a name of 4 and its content:
`moof(mfhd(number), traf(tfdt(time)))`, `mdat`.
Source: ISO/IEC 14496-12, 4.2 (boxes), 8.8.5 (mfhd), 8.8.12 (tfdt).
"""

import struct

CONTAINERS = {b"moof", b"traf"}
HEADER_BYTES = 8


def renumber_fragment(fragment: bytes, frame: int) -> bytes:
    """Return the fragment with this frame as its number and time; the time scale is the frame rate.

    ValueError if it is not a fragment, or its time has 32 bits.
    """
    data = bytearray(fragment)
    found = _renumber(data, 0, len(data), frame)
    if found != {b"mfhd", b"tfdt"}:
        raise ValueError(f"a fragment must have mfhd and tfdt once, found {sorted(found)}")
    return bytes(data)


def _renumber(data: bytearray, start: int, end: int, frame: int) -> set[bytes]:
    """Renumber the boxes in data[start:end]; return the names of the boxes that were changed."""
    found: set[bytes] = set()
    while start < end:
        size, name = struct.unpack_from(">I4s", data, start) if end - start >= HEADER_BYTES else (0, b"")
        if not HEADER_BYTES <= size <= end - start:
            raise ValueError(f"a box of {size} bytes does not fit into {end - start}")
        if name in CONTAINERS:
            found |= _renumber(data, start + HEADER_BYTES, start + size, frame)
        elif name == b"mfhd" and size >= HEADER_BYTES + 8:
            struct.pack_into(">I", data, start + HEADER_BYTES + 4, frame)
            found.add(name)
        elif name == b"tfdt":
            if data[start + HEADER_BYTES] != 1 or size < HEADER_BYTES + 12:
                raise ValueError("tfdt must be of version 1, with 64 bits of time")
            struct.pack_into(">Q", data, start + HEADER_BYTES + 4, frame)
            found.add(name)
        start += size
    return found
