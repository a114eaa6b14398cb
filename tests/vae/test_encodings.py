"""Tests of avatar.vae.encodings."""

import io
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from avatar.vae.encodings import ENCODINGS, Encoded, check_encoding, check_quality, encode, init_segment

RATE_HZ = 25
PORTRAIT = Path(__file__).parents[2] / "assets" / "portrait.png"
Frames = NDArray[np.uint8]


@pytest.fixture(scope="module")
def frames() -> Frames:
    """Three blocks of a moving portrait, (36, 64, 96, 3)."""
    image = np.asarray(Image.open(PORTRAIT).convert("RGB").resize((96, 64)))
    return np.stack([np.roll(image, number // 2, axis=1) for number in range(36)])


def decoded(data: bytes, container: str | None) -> tuple[Frames, list[int]]:
    with av.open(io.BytesIO(data), "r", format=container) as video:
        shown = list(video.decode(video=0))
        times = [round(float(frame.time or 0) * RATE_HZ) for frame in shown]
        return np.stack([frame.to_ndarray(format="rgb24") for frame in shown]), times


def pictures(encoded: list[Encoded], encoding: str, init: bytes = b"") -> Frames:
    """Decode a block as a client does."""
    data = [each.data for each in encoded]
    match encoding:
        case "rgb24":
            return np.stack([np.frombuffer(each, np.uint8).reshape(64, 96, 3) for each in data])
        case "jpeg":
            return np.stack([np.asarray(Image.open(io.BytesIO(each))) for each in data])
        case "h264":
            return decoded(b"".join(data), "h264")[0]
    return decoded(init + b"".join(data), "mp4")[0]


def psnr(one: Frames, two: Frames) -> float:
    return float(10 * np.log10(255**2 / np.mean((one.astype(float) - two) ** 2)))


@pytest.mark.parametrize("encoding", [name for name in ENCODINGS if name != "rgb24"])
def test_every_block_decodes_independently(encoding: str, frames: Frames) -> None:
    block = frames[12:24]
    init = init_segment(encoding, 64, 96, RATE_HZ)
    shown = pictures(encode(block, encoding, RATE_HZ), encoding, init)
    assert shown.shape == block.shape
    assert psnr(shown, block) > 30


def test_raw_frames_are_their_bytes(frames: Frames) -> None:
    view = np.concatenate([frames, frames], axis=2)[:12, :, :96]
    assert [each.data for each in encode(view, "rgb24", RATE_HZ)] == [frame.tobytes() for frame in frames[:12]]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_blocks_bytes_do_not_depend_on_earlier_blocks(encoding: str, frames: Frames) -> None:
    encode(frames[:12], encoding, RATE_HZ)
    later = encode(frames[12:24], encoding, RATE_HZ)
    assert later == encode(frames[12:24], encoding, RATE_HZ)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_block_starts_with_a_key_frame_and_holds_all_its_frames(encoding: str, frames: Frames) -> None:
    block = encode(frames[:9], encoding, RATE_HZ)
    assert block[0].is_key
    assert sum(each.num_frames for each in block) == 9
    assert len(block) == (1 if encoding == "fmp4" else 9)
    if encoding == "h264":
        assert not any(each.is_key for each in block[1:])


def test_trailing_frames_of_a_bare_block_can_be_dropped(frames: Frames) -> None:
    first, second = (encode(frames[at : at + 12], "h264", RATE_HZ) for at in (0, 12))
    shown = pictures(first[:5] + second, "h264")
    assert len(shown) == 17
    assert psnr(shown[5:], frames[12:24]) > 30


@pytest.mark.parametrize("blocks", [(0, 1, 2), (1, 2), (0, 2)], ids=["all", "later ones", "one left out"])
def test_fragments_play_at_their_frames_times(frames: Frames, blocks: tuple[int, ...]) -> None:
    init = init_segment("fmp4", 64, 96, RATE_HZ)
    run = [encode(frames[12 * at :][:12], "fmp4", RATE_HZ, first_frame=12 * at)[0].data for at in blocks]
    shown, times = decoded(init + b"".join(run), "mp4")
    assert times == [12 * at + number for at in blocks for number in range(12)]
    assert psnr(shown, frames[times]) > 30


def test_a_fragments_time_has_eight_bytes_and_its_last_frame_a_length(frames: Frames) -> None:
    late = 1 << 30
    fragment = encode(frames[:12], "fmp4", RATE_HZ, first_frame=late)[0].data
    assert box(fragment, b"mfhd") == struct.pack(">II", 0, late + 1)
    assert box(fragment, b"tfdt") == struct.pack(">IQ", 1 << 24, late)
    with av.open(io.BytesIO(init_segment("fmp4", 64, 96, RATE_HZ) + fragment), "r") as video:
        packets = [packet for packet in video.demux(video=0) if packet.size]
        assert packets[0].time_base == Fraction(1, RATE_HZ)
        assert [packet.duration for packet in packets] == [1] * 12


def box(fragment: bytes, name: bytes) -> bytes:
    """Return a box's content; its size (four bytes) and name precede it."""
    at = fragment.index(name)
    return fragment[at + 4 : at - 4 + int.from_bytes(fragment[at - 4 : at], "big")]


def test_a_fragment_is_moof_and_mdat_and_nothing_else(frames: Frames) -> None:
    fragment = encode(frames[:12], "fmp4", RATE_HZ)[0].data
    kinds, at = [], 0
    while at < len(fragment):
        kinds.append(fragment[at + 4 : at + 8])
        at += int.from_bytes(fragment[at : at + 4], "big")
    assert kinds == [b"moof", b"mdat"]


@pytest.mark.parametrize("encoding", ["jpeg", "h264", "fmp4"])
def test_higher_quality_has_less_error_and_more_bytes(encoding: str, frames: Frames) -> None:
    blocks = [encode(frames[:12], encoding, RATE_HZ, quality) for quality in (10, 50, 95)]
    sizes = [sum(len(each.data) for each in block) for block in blocks]
    inits = [init_segment(encoding, 64, 96, RATE_HZ, quality) for quality in (10, 50, 95)]
    errors = [psnr(pictures(block, encoding, init), frames[:12]) for block, init in zip(blocks, inits, strict=True)]
    assert sizes == sorted(sizes)
    assert errors == sorted(errors)
    assert errors[2] - errors[0] > 5


@pytest.mark.parametrize("encoding", ["gif", ""])
def test_an_unknown_encoding_is_named(encoding: str) -> None:
    with pytest.raises(ValueError, match=f"{encoding!r}, expected one of rgb24, jpeg, h264, fmp4"):
        check_encoding(encoding)


@pytest.mark.parametrize("quality", [-1, 101])
def test_quality_has_bounds(quality: int) -> None:
    for allowed in (0, 1, 100):
        check_quality(allowed)
    with pytest.raises(ValueError, match=str(quality)):
        check_quality(quality)
