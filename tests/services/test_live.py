"""What live mode is made of: clocks, fragments, versions of the conditions, and what is decided for the next block."""

from __future__ import annotations

import asyncio
import struct
from dataclasses import dataclass
from itertools import pairwise

import pytest

from avatar.worker.v1 import audio_pb2, types_pb2
from services.gateway.stream.conditions import Versions
from services.gateway.stream.fragments import renumbered
from services.gateway.stream.speech import Sound
from services.gateway.stream.timeline import Grid, Playout
from tests.services.gateway.test_stream_parts import settled

RATES = [8000, 11025, 12345, 16000, 22050, 44100, 48000]
BLOCK = 7680
BEHIND = 80


@pytest.mark.parametrize("rate_hz", RATES)
def test_sound_and_frames_do_not_drift_apart_in_an_hour(rate_hz: int) -> None:
    grid = Grid(rate_hz, 25, 12)
    assert grid.sample(25 * 3600) == rate_hz * 3600
    frames = [grid.sample(frame + 1) - grid.sample(frame) for frame in range(25 * 3600)]
    assert sum(frames) == rate_hz * 3600
    assert max(frames) - min(frames) <= 1
    assert all(abs(grid.duration_us(grid.sample(frame)) - grid.pts_us(frame)) < 130 for frame in range(0, 90000, 997))


def box(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), name) + content


def fragment(number: int, time: int, version: int = 1) -> bytes:
    tfdt = struct.pack(">B3xQ", 1, time) if version else struct.pack(">B3xI", 0, time)
    traf = box(b"tfhd", bytes(8)) + box(b"tfdt", tfdt) + box(b"trun", bytes(20))
    return box(b"moof", box(b"mfhd", struct.pack(">4xI", number)) + box(b"traf", traf)) + box(b"mdat", b"mfhd tfdt")


def test_a_fragment_is_renumbered_in_its_two_places_and_nowhere_else() -> None:
    assert renumbered(fragment(7, 84), 1 << 31) == fragment(1 << 31, 1 << 31)


@pytest.mark.parametrize("broken", [b"", b"no box", box(b"mdat", b""), fragment(1, 2)[:-1], fragment(1, 2, version=0)])
def test_what_is_no_fragment_is_refused(broken: bytes) -> None:
    with pytest.raises(ValueError, match=r"box|fragment|tfdt"):
        renumbered(broken, 3)


@dataclass
class Clock:
    """A clock that a test sets."""

    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


class Deciding:
    """Sound at 16 kHz whose next block is decided when a test asks; frames go out as soon as blocks are begun."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.grid = Grid(16000, 25, 12)
        self.sound = Sound(self.grid, 2, self.clock)
        self.playout = Playout(self.grid, 0.07, self.clock)
        self.playout.restart(0)
        self.num_blocks = 0

    def wait_s(self) -> float:
        """How long the next block is put off."""
        return self.sound._wait_s(self.playout.deadline_s(12 * self.num_blocks), BEHIND, 0.25)

    async def block(self) -> audio_pb2.AudioPiece:
        """The next block, once it is due."""
        self.clock.now_s += self.wait_s()
        self.num_blocks += 1
        first_frame = 12 * (self.num_blocks - 1)
        pieces = self.sound.live(self.playout, lambda: first_frame, BEHIND, 0.25, lambda: asyncio.sleep(0))
        piece = await anext(pieces)
        await pieces.aclose()
        return piece

    @property
    def is_idle(self) -> bool:
        return self.sound.begun[-1].turn is None

    def say(self, num_samples: int) -> None:
        self.sound.take(b"\1\0" * num_samples)


async def test_idle_blocks_come_just_in_time() -> None:
    deciding = Deciding()
    began = []
    for _ in range(4):
        await deciding.block()
        began.append(deciding.clock.now_s)
        assert deciding.is_idle
    assert [later - earlier for earlier, later in pairwise(began)] == pytest.approx([0.48] * 3)


async def test_speech_is_begun_as_soon_as_the_sound_behind_its_block_is_there() -> None:
    deciding = Deciding()
    await deciding.block()
    deciding.clock.now_s += 0.1
    deciding.say(BLOCK + BEHIND - 1)
    assert deciding.wait_s() > 0
    deciding.say(1)
    assert deciding.wait_s() == 0
    piece = await deciding.block()
    assert (len(piece.data), len(piece.behind), piece.completes) == (2 * BLOCK, 2 * BEHIND, 1)
    assert not deciding.is_idle


async def test_speech_that_waits_is_begun_at_most_a_block_early() -> None:
    deciding = Deciding()
    await deciding.block()
    deciding.say(10 * BLOCK)
    began = []
    for _ in range(4):
        await deciding.block()
        began.append(deciding.clock.now_s)
    assert began[0] == pytest.approx(100.0)
    assert [later - earlier for earlier, later in pairwise(began)] == pytest.approx([0.48] * 3)


async def test_an_idle_block_goes_in_front_of_speech_that_is_just_beginning() -> None:
    deciding = Deciding()
    await deciding.block()
    deciding.clock.now_s += deciding.wait_s()
    deciding.say(1600)
    await deciding.block()
    assert deciding.is_idle
    assert deciding.sound.pending_samples == 1600


async def test_speech_that_is_nearly_whole_is_waited_for_and_then_filled_with_silence() -> None:
    deciding = Deciding()
    await deciding.block()
    deciding.clock.now_s += deciding.wait_s()
    deciding.say(BLOCK - 1600)
    assert deciding.wait_s() == pytest.approx(0.25)
    piece = await deciding.block()
    assert not deciding.is_idle
    assert piece.data == b"\1\0" * (BLOCK - 1600) + bytes(2 * 1600)


async def test_the_end_of_a_turn_is_not_waited_behind() -> None:
    deciding = Deciding()
    await deciding.block()
    deciding.say(1600)
    deciding.sound.end_turn()
    assert deciding.wait_s() == 0
    deciding.say(1600)
    await deciding.block()
    assert deciding.sound.begun[-1].num_samples == 1600


async def test_a_prompt_waits_for_the_sinks_update_and_is_added_to_it() -> None:
    versions, written = Versions(types_pb2.Position(), types_pb2.Conditions(), sink_update_block=3), []

    async def write(newest: int, version: int) -> types_pb2.Conditions:
        written.append((newest, version))
        return types_pb2.Conditions(version=version)

    async def admitted() -> tuple[int, int, int]:
        block = types_pb2.Block()
        await versions.admit(block)
        return block.index, block.conditions, block.carried.version

    assert await versions.change(write) == 0
    assert await admitted() == (0, 1, 1)
    changing = asyncio.ensure_future(versions.change(write))
    assert await admitted() == (1, 1, 0)
    await settled()
    assert not changing.done()
    versions.finished(0)
    assert await changing == 3
    assert [await admitted() for _ in range(3)] == [(2, 1, 0), (3, 3, 3), (4, 3, 0)]
    assert written == [(0, 1), (2, 3)], "2 is the sink's, which the last level wrote"
