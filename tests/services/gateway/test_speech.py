"""Tests of services.gateway.stream.speech: which block a live stream starts next, and when."""

import asyncio
from itertools import pairwise

import pytest

from avatar.worker.v1 import audio_pb2, types_pb2
from services.gateway.options import StreamOptions
from services.gateway.stream.in_flight import BlocksInFlight
from services.gateway.stream.incoming.heard_queue import HeardQueue
from services.gateway.stream.outbox import Outbox
from services.gateway.stream.speech import LivePacing, SpeechQueue
from services.gateway.stream.timeline import MediaGrid, Timeline
from tests.services.gateway.clock import Clock, settled

BLOCK = 7680
LOOKAHEAD = 80
GRID = MediaGrid(16000, 25, 12)


class SpeechAtTheClock:
    """Speech at 16 kHz by a clock that a test moves; a block's frames are delivered as soon as it is started."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.in_flight = BlocksInFlight(1)
        self.in_flight.connected.set()
        self.heard = HeardQueue(StreamOptions("pcm16", 16000, 1, "rgb24", is_live=True), GRID, max_ahead_s=1.0)
        pacing, take_heard = LivePacing(LOOKAHEAD, 0.25), self.heard.take
        self.queue = SpeechQueue(GRID, 2, self.in_flight, pacing, now=self.clock, take_heard=take_heard)
        self.timeline = Timeline(GRID, 0.07, self.clock)
        self.timeline.restart(0)
        self.num_blocks = 0

    def wait_s(self) -> float:
        """Return by how long the next block is put off."""
        return self.queue._wait_s(self.timeline.start_by_s(12 * self.num_blocks))

    async def block(self) -> audio_pb2.AudioPiece:
        """Start the next block when it is due; return its audio."""
        self.clock.now_s += self.wait_s()
        position = types_pb2.Position(next_frame=12 * self.num_blocks)
        outbox = Outbox(GRID, position, kept_frames=50, kept_bytes=1, max_unread_s=1.0, is_fragmented=False)
        pieces = self.queue.live(self.timeline, outbox)
        piece = await anext(pieces)
        await pieces.aclose()
        self.num_blocks += 1
        self.in_flight.started[-1].num_frames = 0
        self.in_flight._slots.release()
        return piece

    @property
    def is_idle(self) -> bool:
        return self.in_flight.started[-1].turn is None

    def add(self, num_samples: int) -> None:
        self.queue.add(b"\1\0" * num_samples)


async def test_idle_blocks_come_just_in_time() -> None:
    speech = SpeechAtTheClock()
    started = []
    for _ in range(4):
        await speech.block()
        started.append(speech.clock.now_s)
        assert speech.is_idle
    assert [later - earlier for earlier, later in pairwise(started)] == pytest.approx([0.48] * 3)


async def test_speech_starts_as_soon_as_its_block_and_the_lookahead_are_there() -> None:
    speech = SpeechAtTheClock()
    await speech.block()
    speech.clock.now_s += 0.1
    speech.add(BLOCK + LOOKAHEAD - 1)
    assert speech.wait_s() > 0
    speech.add(1)
    assert speech.wait_s() == 0
    piece = await speech.block()
    assert (len(piece.data), len(piece.behind), piece.completes) == (2 * BLOCK, 2 * LOOKAHEAD, 1)
    assert not speech.is_idle


async def test_waiting_speech_starts_at_most_a_block_early() -> None:
    speech = SpeechAtTheClock()
    await speech.block()
    speech.add(10 * BLOCK)
    started = []
    for _ in range(4):
        await speech.block()
        started.append(speech.clock.now_s)
    assert started[0] == pytest.approx(100.0)
    assert [later - earlier for earlier, later in pairwise(started)] == pytest.approx([0.48] * 3)


async def test_an_idle_block_goes_in_front_of_speech_that_is_just_beginning() -> None:
    speech = SpeechAtTheClock()
    await speech.block()
    speech.clock.now_s += speech.wait_s()
    speech.add(1600)
    await speech.block()
    assert speech.is_idle
    assert speech.queue.pending_samples == 1600


async def test_a_block_waits_for_speech_that_is_nearly_complete_and_is_then_filled_with_silence() -> None:
    speech = SpeechAtTheClock()
    await speech.block()
    speech.clock.now_s += speech.wait_s()
    speech.add(BLOCK - 1600)
    assert speech.wait_s() == pytest.approx(0.25)
    piece = await speech.block()
    assert not speech.is_idle
    assert piece.data == b"\1\0" * (BLOCK - 1600) + bytes(2 * 1600)


async def test_a_turn_that_has_ended_does_not_wait_for_more() -> None:
    speech = SpeechAtTheClock()
    await speech.block()
    speech.add(1600)
    speech.queue.end_turn()
    assert speech.wait_s() == 0
    speech.add(1600)
    await speech.block()
    assert speech.in_flight.started[-1].num_samples == 1600


async def test_only_audio_that_starts_or_completes_a_block_wakes_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    speech, looks = SpeechAtTheClock(), []
    wait_s = speech.queue._wait_s

    def looked(start_by_s: float) -> float:
        looks.append(start_by_s)
        return wait_s(start_by_s)

    monkeypatch.setattr(speech.queue, "_wait_s", looked)
    position = types_pb2.Position(next_frame=360)  # due in 14 s
    outbox = Outbox(GRID, position, kept_frames=50, kept_bytes=1, max_unread_s=1.0, is_fragmented=False)
    pieces = speech.queue.live(speech.timeline, outbox)
    starting = asyncio.get_running_loop().create_task(anext(pieces))
    for _ in range(BLOCK // 320):  # pieces of 20 ms
        speech.add(320)
        await settled()
    assert not starting.done()
    assert len(looks) <= 2
    speech.clock.now_s += 14.0
    speech.add(LOOKAHEAD)
    piece = await starting
    assert len(piece.data) == 2 * BLOCK
    await pieces.aclose()


async def test_idle_blocks_and_speech_take_what_the_avatar_listens_to_and_an_interrupt_leaves_it() -> None:
    speech = SpeechAtTheClock()
    speech.heard.add(bytes(2 * 1000))
    idle = await speech.block()
    assert speech.is_idle
    assert [(each.first_sample, len(each.data)) for each in idle.heard] == [(BLOCK - 1000, 2 * 1000)]
    speech.add(BLOCK + LOOKAHEAD)
    assert not (await speech.block()).heard, "it waits for none"
    speech.heard.add(bytes(2 * 500))
    speech.add(BLOCK)
    speech.queue.interrupt()
    [heard] = (await speech.block()).heard
    assert (heard.first_sample, len(heard.data)) == (3 * BLOCK - 500, 2 * 500)
