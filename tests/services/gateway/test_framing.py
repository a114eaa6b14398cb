"""Tests of services.gateway.stream.framing."""

from dataclasses import replace

import pytest

from avatar.v1 import types_pb2 as api
from avatar.worker.v1.types_pb2 import Frame
from services.gateway.options import StreamOptions
from services.gateway.stream.framing import Framer
from services.gateway.stream.in_flight import StartedBlock, Turn
from services.gateway.stream.outbox import Item

OPTIONS = StreamOptions("pcm16", 16000, 1, "jpeg", returns_audio=True)
AUDIO = bytes(range(1, 97))  # 12 frames of 4 samples
# A block as a decoder sends it: three chunks of four frames.
FRAMES = [
    Frame(index=index, data=b"%d" % index, num_frames=1, is_last=index == 11, is_followed=index % 4 < 3)
    for index in range(12)
]


def framed(options: StreamOptions) -> list[Item]:
    """Return the items of a block of speech, without the event that begins it."""
    block = StartedBlock(Turn(0, is_started=True), 48, 0, 0, AUDIO, range(0, 52, 4), 12, 0.0)
    framer, items = Framer(options), list[Item]()
    for frame in FRAMES:
        for item in framer.add(frame, block, is_discontinuity=not items):
            block.num_frames -= item.num_frames
            items.append(item)
    return items


def frames_of(item: Item) -> list[api.VideoFrame]:
    message = item.messages[-1]
    return [message.frame] if message.HasField("frame") else list(message.chunk.frames)


@pytest.mark.parametrize(
    ("changed", "sizes"),
    [({}, [1] * 12), ({"takes_chunks": True}, [4] * 3), ({"takes_chunks": True, "is_per_block": True}, [12])],
    ids=["alone", "chunks", "block"],
)
def test_frames_that_are_ready_together_share_a_message_and_its_audio_if_the_client_takes_chunks(
    changed: dict[str, bool], sizes: list[int]
) -> None:
    items = framed(replace(OPTIONS, **changed))  # type: ignore[arg-type]
    assert [item.num_frames for item in items] == [len(frames_of(item)) for item in items] == sizes
    assert [frame.data for item in items for frame in frames_of(item)] == [frame.data for frame in FRAMES]
    assert b"".join(item.messages[0].audio.data for item in items) == AUDIO
    assert items[-1].num_samples == items[-1].num_delivered == 48
    assert [frame.is_discontinuity for item in items for frame in frames_of(item)] == [True] + [False] * 11


def test_a_frame_that_is_ready_alone_is_no_chunk() -> None:
    block = StartedBlock(None, 0, 0, 0, AUDIO, range(0, 52, 4), 12, 0.0)
    [item] = Framer(replace(OPTIONS, takes_chunks=True)).add(FRAMES[3], block, is_discontinuity=False)
    assert item.messages[-1].HasField("frame")
