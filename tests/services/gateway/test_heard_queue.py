"""Tests of services.gateway.stream.incoming.heard_queue: where the other person's audio lies in the stream's time."""

from dataclasses import replace

import pytest

from avatar.errors import AvatarError, InvalidAudio, MessageTooLarge, ProtocolOrder
from avatar.v1 import avatar_service_pb2 as api
from services.gateway.options import AudioOptions, StreamOptions
from services.gateway.stream.incoming.heard_queue import HeardQueue
from services.gateway.stream.timeline import MediaGrid
from tests.services.gateway.test_live_stream import Pipeline

BLOCK = 2560
LIVE = StreamOptions("pcm16", 16000, 1, "rgb24", is_live=True)
OFFLINE = replace(LIVE, is_live=False)


def queue(options: StreamOptions = LIVE) -> HeardQueue:
    return HeardQueue(options, MediaGrid(16000, 25, 4), max_ahead_s=1.0)


def sound(first: int, stop: int) -> bytes:
    """Samples that count from a number, so that each one can be told from the others."""
    return b"".join(number.to_bytes(2, "little") for number in range(first, stop))


def taken(heard: HeardQueue, num_blocks: int, num_samples: int = 0) -> tuple[int, bytes] | None:
    """The place of the first sample, and the samples, that a block takes."""
    pieces = heard.take(num_blocks, num_samples)
    return (pieces[0].first_sample, pieces[0].data) if pieces else None


def test_a_live_block_takes_what_has_arrived_and_it_ends_with_the_block() -> None:
    heard = queue()
    assert taken(heard, 1) is None
    heard.add(sound(0, 1000))
    assert taken(heard, 2) == (2 * BLOCK - 1000, sound(0, 1000))
    assert taken(heard, 3) is None
    heard.add(sound(1000, 1000 + 2 * BLOCK))  # what was held up on its way fills the pause
    assert taken(heard, 4) == (2 * BLOCK, sound(1000, 1000 + 2 * BLOCK))


def test_after_the_first_delay_jitter_leaves_no_gaps() -> None:
    heard, num_sent, stops = queue(), 0, []
    for block, late in enumerate([320, 0, 640, 0, 320, 640, 0, 320, 0, 640], 1):
        heard.add(sound(num_sent, block * BLOCK - late))
        num_sent = block * BLOCK - late
        place, data = taken(heard, block) or (0, b"")
        stops.append((place, place + len(data) // 2))
    assert stops[3:] == [(block * BLOCK, (block + 1) * BLOCK) for block in range(3, 10)]


def test_audio_that_keeps_arriving_too_fast_is_dropped_the_oldest_first() -> None:
    heard = queue()
    heard.add(sound(0, BLOCK + 3200))
    assert taken(heard, 1) == (0, sound(0, BLOCK)), "0.2 s wait"
    heard.add(sound(BLOCK + 3200, 2 * BLOCK + 3201))
    assert taken(heard, 2) == (BLOCK, sound(BLOCK + 3201, 2 * BLOCK + 3201)), "more than that are too late"
    heard.add(bytes(2 * 20000))
    assert len(heard._pending) == 2 * 16000


def test_offline_audio_lies_on_the_clock_of_the_speech() -> None:
    heard = queue(replace(OFFLINE, other_heard=AudioOptions("pcm16", 8000, 2)))
    heard.add(4 * bytes(3000))
    assert taken(heard, 1) == (0, 4 * bytes(BLOCK // 2))
    assert taken(heard, 1, 800) == (BLOCK // 2, 4 * bytes(400))
    assert taken(heard, 4) == (BLOCK // 2 + 400, 4 * bytes(3000 - BLOCK // 2 - 400))
    heard.add(4 * bytes(8000))
    with pytest.raises(ProtocolOrder, match=r"more than 1 s of `listen` wait for audio of the same time"):
        heard.add(4 * bytes(1))


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (b"\1", InvalidAudio, "listen.data: 1 bytes are no multiple of 2"),
        (bytes(1002), MessageTooLarge, "1002 bytes of audio at once, the limit is 1000"),
    ],
)
async def test_a_piece_is_limited_as_one_of_speech(data: bytes, error: type[AvatarError], message: str) -> None:
    stream = Pipeline(options=LIVE, max_audio_bytes=1000).stream
    stream._stages.listens = True
    with pytest.raises(error, match=message):
        await stream.receive(api.StreamAvatarRequest(listen=api.HeardAudio(data=data)))
