"""Mutated pictures of all formats go into the decoder process, which decodes or refuses them within its limits."""

import re
import resource
import struct
import time
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from avatar.vae.picture.decoder import CPU_S, MEMORY_BYTES, decode
from avatar.vae.picture.reading import LONGEST_S, read_picture
from avatar.vae.picture.rule import PictureRule
from tests.vae.picture.files import HEIC_PHOTO, HEIC_WIDE_GAMUT, file, photo, progressive_jpeg
from tests.vae.picture.test_colour import GAMMA, WIDE, display_profile, press_profile

RULE = PictureRule("cover", width=64, height=48)
EXIF = Image.Exif()
EXIF[0x0112] = 6
SECOND = [Image.new("RGB", (64, 48))]
FILES = {
    "png": file(photo(64, 48)),
    "png with transparency": file(photo(64, 48, "RGBA")),
    "png with a palette": file(photo(64, 48).quantize(16), transparency=bytes(range(16))),
    "png of 16 bits": file(Image.fromarray(np.arange(64 * 48, dtype=np.uint16).reshape(48, 64) * 20)),
    "png with a profile": file(photo(64, 48), icc_profile=display_profile(WIDE, GAMMA), exif=EXIF.tobytes()),
    "animated png": file(photo(64, 48), save_all=True, append_images=SECOND),
    "jpeg": file(photo(64, 48), "JPEG", exif=EXIF.tobytes()),
    "progressive jpeg": file(photo(64, 48), "JPEG", progressive=True),
    "jpeg of empty scans": progressive_jpeg(512, 512, 90),
    "cmyk jpeg": file(photo(64, 48, "CMYK"), "JPEG", icc_profile=press_profile()),
    "mpo": file(photo(64, 48), "MPO", save_all=True, append_images=SECOND),
    "webp": file(photo(64, 48), "WEBP", exif=EXIF.tobytes()),
    "lossless webp": file(photo(64, 48, "RGBA"), "WEBP", lossless=True),
    "animated webp": file(photo(64, 48), "WEBP", save_all=True, append_images=SECOND),
    "avif": file(photo(64, 48, "RGBA"), "AVIF", icc_profile=display_profile(WIDE, GAMMA)),
    "heic": HEIC_PHOTO,
    "heic with a profile": HEIC_WIDE_GAMUT,
}
DOCUMENTED = re.compile(r"not a PNG, |damaged |too (small|large): |more than 100 scans|takes too long ")
# The interpreter and its libraries, which are files in memory and so not limited; and the interval of the limits.
LIBRARY_BYTES, INTERVAL_S = 1 << 29, 5.0

NUMBERS = [
    struct.pack(order + kind, value)
    for order in "<>"
    for kind, value in (
        ("H", 0xFFFF),
        ("H", 0x7FFF),
        ("I", 0xFFFFFFFF),
        ("I", 0x7FFFFFFF),
        ("I", 0x10000),
        ("I", 0),
        ("I", 7000),
    )
]
PLACES = st.floats(0, 1, exclude_max=True)
MUTATIONS = st.one_of(
    st.tuples(st.just("overwrite"), PLACES, st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from(NUMBERS))),
    st.tuples(st.just("insert"), PLACES, st.one_of(st.binary(min_size=1, max_size=64), st.sampled_from(NUMBERS))),
    st.tuples(st.just("delete"), PLACES, st.integers(1, 64)),
    st.tuples(st.just("repeat"), PLACES, st.integers(1, 20_000)),
    st.tuples(st.just("cut"), PLACES, st.just(0)),
)


def mutated(data: bytes, mutation: tuple[str, float, bytes | int]) -> bytes:
    kind, place, what = mutation
    # Headers decide how much is decoded, so half of the mutations are in the first bytes.
    at = int(place * len(data)) if place > 0.5 else int(2 * place * min(len(data), 200))
    match kind, what:
        case "overwrite", bytes():
            return data[:at] + what + data[at + len(what) :]
        case "insert", bytes():
            return data[:at] + what + data[at:]
        case "delete", int():
            return data[:at] + data[at + what :]
        case "repeat", int():
            return data[:at] + data[at : at + 64] * what + data[at:]
    return data[:at]


def with_checksums(data: bytes) -> bytes:
    """Return a PNG with the checksums of its chunks, without which a decoder would look at none of the mutations."""
    out, at = data[:8], 8
    while at + 12 <= len(data):
        body = data[at + 4 : at + 8 + int.from_bytes(data[at : at + 4])]
        out += data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 8 + len(body)
    return out + data[at:]


def peak_kib() -> int:
    """Return the largest memory that a process started from here ever had, in KiB."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


@pytest.mark.slow
@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(sorted(FILES)), st.lists(MUTATIONS, min_size=1, max_size=6), st.booleans())
def test_a_mutated_picture_is_decoded_or_refused_within_the_limits(
    name: str, mutations: list[tuple[str, float, bytes | int]], is_repaired: bool
) -> None:
    data = FILES[name]
    for mutation in mutations:
        data = mutated(data, mutation)
    if is_repaired and "png" in name:
        data = with_checksums(data)
    before, before_kib, started_s = processor_s(), peak_kib(), time.monotonic()
    try:
        assert read_picture(data, RULE).rgb.shape == (48, 64, 3)
    except ValueError as error:
        assert DOCUMENTED.match(str(error)), error  # noqa: PT017  # any other error of the process fails the test
    assert time.monotonic() - started_s < LONGEST_S + INTERVAL_S
    assert processor_s() - before < CPU_S + INTERVAL_S
    # The peak is that of all children so far: one that another test started may have been larger.
    assert peak_kib() == before_kib or peak_kib() << 10 < MEMORY_BYTES + LIBRARY_BYTES


def processor_s() -> float:
    """Return the processor time of all processes that this one has started and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("name", FILES)
def test_the_pictures_before_their_mutation_are_read(name: str) -> None:
    assert decode(FILES[name], RULE).image.size == (64, 48)
