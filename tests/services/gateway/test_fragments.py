"""Tests of services.gateway.stream.fragments."""

import struct

import pytest

from services.gateway.stream.fragments import renumber_fragment


def box(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), name) + content


def fragment(number: int, time: int, version: int = 1) -> bytes:
    tfdt = struct.pack(">B3xQ", 1, time) if version else struct.pack(">B3xI", 0, time)
    traf = box(b"tfhd", bytes(8)) + box(b"tfdt", tfdt) + box(b"trun", bytes(20))
    return box(b"moof", box(b"mfhd", struct.pack(">4xI", number)) + box(b"traf", traf)) + box(b"mdat", b"mfhd tfdt")


def test_a_fragment_is_renumbered_in_its_two_places_and_nowhere_else() -> None:
    assert renumber_fragment(fragment(7, 84), 1 << 31) == fragment(1 << 31, 1 << 31)


@pytest.mark.parametrize("broken", [b"", b"no box", box(b"mdat", b""), fragment(1, 2)[:-1], fragment(1, 2, version=0)])
def test_bytes_that_are_no_fragment_are_refused(broken: bytes) -> None:
    with pytest.raises(ValueError, match=r"box|fragment|tfdt"):
        renumber_fragment(broken, 3)
