"""Tests of what the audio stage makes of the other person's audio."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from avatar.audio.model import OVERLAP_SAMPLES, AudioModel, interpolate
from avatar.audio.statistics import AudioStatistics
from avatar.failover.replay import AudioReplay
from avatar.rpc.codec import block_to_wire, heard_from_pb, piece_from_bytes
from avatar.rpc.wire import RelayedBlock
from avatar.types import AudioPiece, Block, HeardAudio, Session
from avatar.worker.v1 import audio_pb2 as pb
from tests.audio.conftest import with_short_blocks

INPUTS = ("heard", "face_motion")


def pieces(model: AudioModel, own: Tensor, others: dict[int, HeardAudio]) -> list[AudioPiece]:
    """Cut own audio (1, s) into a piece per block, some of which bring audio of the other."""
    block = model.grid.samples
    count = own.shape[1] // block
    return [
        AudioPiece(
            own[:, at * block : (at + 1) * block], 16000, completes=at, heard=[others[at]] if at in others else ()
        )
        for at in range(count)
    ]


def stream(
    model: AudioModel, session: Session, audio: list[AudioPiece], inputs: tuple[str, ...] = INPUTS
) -> list[Block]:
    state = model.open(session, inputs)
    return [block for piece in audio for block in model.step(piece, state)]


def whole_blocks(model: AudioModel, speech: Tensor, count: int) -> Tensor:
    """Return `count` blocks of the voice, (1, s)."""
    return speech[:, 16000:][:, : count * model.grid.samples]


def in_pieces(model: AudioModel, other: Tensor, late: int = 0) -> dict[int, HeardAudio]:
    """Return the other's audio (1, s) by the block whose piece brings it: its own, or `late` blocks after it."""
    parts = torch.split(other, model.grid.samples, dim=1)
    return {at + late: HeardAudio(part, 16000, at * model.grid.samples) for at, part in enumerate(parts)}


@with_short_blocks
def test_the_others_features_are_those_of_windows_that_end_with_the_block(
    model: AudioModel, session: Session, speech: Tensor
) -> None:
    other = whole_blocks(model, speech, 5)
    blocks = stream(model, session, pieces(model, torch.zeros_like(other), in_pieces(model, other)))
    encoder, block_samples, statistics = model.encoder, model.grid.samples, AudioStatistics()
    size = encoder.left_samples + model.grid.window_end(0, encoder.right_frames) - OVERLAP_SAMPLES
    for index, block in enumerate(blocks):
        end = (index + 1) * block_samples
        window = functional.pad(other[0, :end], (max(0, size - end), 0))[-size:]
        statistics = statistics.with_samples(window[-block_samples:])
        states, statistics = encoder.encode(functional.pad(window, (0, OVERLAP_SAMPLES)), statistics, 0)
        assert block.heard is not None
        assert torch.equal(block.heard, interpolate(states, index, model.grid))
        assert block.heard.shape == block.features.shape


@with_short_blocks
def test_without_the_other_blocks_are_as_without_the_input(model: AudioModel, session: Session, speech: Tensor) -> None:
    own = whole_blocks(model, speech, 3)
    plain = stream(model, session, pieces(model, own, {}), ())
    listening = stream(model, session, pieces(model, own, {}))
    with_other = stream(model, session, pieces(model, own, in_pieces(model, own.flip(1))))
    assert [block.heard for block in listening] == [None] * 3
    for one, other, third in zip(plain, listening, with_other, strict=True):
        assert torch.equal(one.features, other.features)
        assert torch.equal(one.features, third.features)
        assert (one.face_motion, len(one.statistics)) == (None, 32)
    ignored = stream(model, session, pieces(model, own, in_pieces(model, own)), ())
    assert [block_to_wire(block).to_pb() for block in ignored] == [block_to_wire(block).to_pb() for block in plain]


def test_nothing_waits_for_the_other_and_what_is_late_counts_later(
    model: AudioModel, session: Session, speech: Tensor
) -> None:
    other = whole_blocks(model, speech, 4)
    own = torch.zeros_like(other)
    timely = stream(model, session, pieces(model, own, in_pieces(model, other)), ("heard",))
    late = stream(model, session, pieces(model, own, in_pieces(model, other[:, : 3 * model.grid.samples], late=1)))
    assert late[0].heard is None
    for index in (1, 2, 3):
        heard, expected = late[index].heard, timely[index].heard
        assert heard is not None
        assert expected is not None
        assert not torch.allclose(heard, expected), "its own block's audio is not there yet"


def test_nobody_is_heard_once_the_window_is_empty(model: AudioModel, session: Session) -> None:
    block = model.grid.samples
    reach = round(model.history_s * 16000) // block + 2
    one = HeardAudio(torch.full((1, 100), 0.1), 16000, block)
    audio = pieces(model, torch.zeros(1, (reach + 2) * block), {1: one})
    is_heard = [each.heard is not None for each in stream(model, session, audio)]
    assert is_heard[:3] == [False, True, True]
    assert not is_heard[-1]


@pytest.mark.parametrize(
    ("heard", "message"),
    [
        (HeardAudio(torch.zeros(1, 100), 16000, 90000), "ends at sample 90100, behind the stream's own"),
        (HeardAudio(torch.full((1, 10), 9.0), 16000, 0), r"audio samples must be in \[-1, 1\]"),
        (HeardAudio(torch.zeros(1, 100), 24000, 0), "must keep its rate of 16000 Hz, got 24000"),
    ],
)
def test_invalid_audio_of_the_other_is_refused(
    heard: HeardAudio, message: str, model: AudioModel, session: Session
) -> None:
    state = model.open(session, INPUTS)
    first = HeardAudio(torch.zeros(1, 100), 16000, 0)
    model.step(AudioPiece(torch.zeros(1, 1000), 16000, heard=[first]), state)
    with pytest.raises(ValueError, match=message):
        model.step(AudioPiece(torch.zeros(1, 1000), 16000, heard=[heard]), state)


def encoded(model: AudioModel, session: Session, opened: pb.OpenEncode, items: list[pb.AudioPiece]) -> list[Block]:
    """Return the blocks of a stream that is opened as a worker opens it."""
    state = model.resume(session, opened.first_block, opened.first_answer, opened.statistics, opened.inputs)
    blocks = []
    for item in items:
        piece = piece_from_bytes(item.data, "pcm16", 16000, 1)
        heard = [heard_from_pb(each) for each in item.heard]
        completes = item.completes if item.HasField("completes") else None
        blocks += model.step(replace(piece, completes=completes, heard=heard), state)
    return blocks


@with_short_blocks
@pytest.mark.parametrize("rate_hz", [16000, 22050])
def test_a_rebuilt_stream_gives_the_same_bytes(rate_hz: int, model: AudioModel, session: Session) -> None:
    block, count = model.grid.samples, 24 // model.grid.latents
    random = torch.Generator().manual_seed(0)
    own = (torch.randn(count * block, generator=random) * 3000).short()
    other = (torch.randn(count * block * rate_hz // 16000, generator=random) * 3000).short()
    items, heard_block = [], block * rate_hz // 16000
    for at in range(count):
        piece = pb.AudioPiece(data=own[at * block : (at + 1) * block].numpy().tobytes(), completes=at)
        if at % 5 != 3:  # some of it never comes
            data = other[at * heard_block : (at + 1) * heard_block - 7].numpy().tobytes()
            piece.heard.add(data=data, encoding="pcm16", rate_hz=rate_hz, num_channels=1, first_sample=at * heard_block)
        items.append(piece)
    opened = pb.OpenEncode(session_id="a", seed=5, inputs=INPUTS)
    expected = [block_to_wire(each).to_pb() for each in encoded(model, session, opened, items)]
    replay = AudioReplay(2, 16000, block / 16000, model.lookahead_s, b"")
    replay.set_window(pb.EncodeOpened(history_s=model.history_s))
    for index in range(count - 2):
        replay.record(items[index])
        if index:
            assert replay.accept(RelayedBlock(expected[index - 1])) == index - 1
    replay.set_start(opened)
    assert opened.first_answer == count - 3
    assert opened.first_block > 0
    for item in items[count - 2 :]:
        replay.record(item)
    rebuilt = [block_to_wire(each).to_pb() for each in encoded(model, session, opened, list(replay.items()))]
    assert rebuilt == expected[count - 3 :]
