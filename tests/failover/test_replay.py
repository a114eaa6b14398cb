"""Tests of avatar.failover.replay: what a rebuilt stream receives, and which answers are repeats."""

from avatar.failover.replay import AudioReplay, BlockReplay
from avatar.rpc.wire import RelayedBlock
from avatar.worker.v1 import audio_pb2 as pb
from avatar.worker.v1.denoiser_pb2 import DenoiseOpened, OpenDenoise
from avatar.worker.v1.types_pb2 import Block, Conditions, Frame, Tensor


def started(replay: BlockReplay) -> OpenDenoise:
    """Return the message that opens a rebuilt stream."""
    message = OpenDenoise()
    replay.set_start(message)
    return message


def test_unanswered_blocks_and_so_many_before_them_are_kept() -> None:
    replay = BlockReplay(next_block=4)
    replay.set_window(DenoiseOpened(history_blocks=2))
    assert (started(replay).first_block, replay.is_answer_due) == (4, False)
    for index in range(4, 10):
        replay.record(Block(index=index))
    assert replay.is_answer_due
    assert [replay.accept(RelayedBlock(Block(index=index))) for index in (4, 5, 6, 7)] == [4, 5, 6, 7]
    assert started(replay).first_block == 6
    assert [each.index for each in replay.items()] == [6, 7, 8, 9]
    assert replay.accept(RelayedBlock(Block(index=7))) is None


def test_frames_that_are_repeated_are_left_out() -> None:
    replay = BlockReplay()
    replay.record(Block(index=0))
    replay.record(Block(index=1))
    frames = [Frame(block=n // 3, index=n + 3, is_last=n % 3 == 2) for n in range(6)]
    assert [replay.accept(each) for each in frames[:4]] == [0, 0, 0, 1]
    assert [each.index for each in replay.items()] == [1]
    assert [replay.accept(each) for each in frames] == [None, None, None, None, 1, 1]
    assert not replay.is_answer_due


def test_whole_blocks_of_audio_are_kept() -> None:
    replay = AudioReplay(sample_bytes=2, rate_hz=16000, block_s=0.48, lookahead_s=0.2, statistics=b"")
    replay.set_window(pb.EncodeOpened(history_s=0.96))
    half = bytes(7680)
    for _ in range(10):
        replay.record(pb.AudioPiece(data=half, slack_s=0.4))
    assert replay.is_answer_due
    assert replay.accept(RelayedBlock(Block(index=0, statistics=b"0"))) == 0
    assert replay.accept(RelayedBlock(Block(index=1, statistics=b"1"))) == 1
    assert replay.accept(RelayedBlock(Block(index=2, statistics=b"2"))) == 2
    message = pb.OpenEncode(session_id="a")
    replay.set_start(message)
    assert message == pb.OpenEncode(session_id="a", first_block=1, first_answer=3, statistics=b"2")
    assert [piece.slack_s for piece in replay.items()] == [0.0] * 8, "pieces that are sent again are late"
    replay.record(pb.AudioPiece(data=b"", completes=4))
    assert replay.accept(RelayedBlock(Block(index=3))) == 3
    assert replay.is_answer_due, "block 4 was asked for"
    assert replay.accept(RelayedBlock(Block(index=4))) == 4
    assert not replay.is_answer_due


def test_tiny_pieces_of_audio_are_kept_together_and_apart_by_block() -> None:
    replay = AudioReplay(sample_bytes=2, rate_hz=16000, block_s=0.48, lookahead_s=0.2, statistics=b"")
    data = b"".join(index.to_bytes(2, "little") for index in range(10000))
    for start in range(0, len(data), 2):
        replay.record(pb.AudioPiece(data=data[start : start + 2]))
    replay.record(pb.AudioPiece(data=b"", completes=1))
    kept = replay.items()
    assert len(kept) == 4 + 2 + 1
    assert b"".join(piece.data for piece in kept) == data
    assert replay.accept(RelayedBlock(Block(index=0))) == 0
    assert b"".join(piece.data for piece in replay.items()) == data[2 * 7680 :]


def test_pieces_with_audio_of_the_other_stay_whole() -> None:
    replay = AudioReplay(sample_bytes=2, rate_hz=16000, block_s=0.48, lookahead_s=0.2, statistics=b"")
    sent = [
        pb.AudioPiece(data=b"00", heard=[pb.HeardAudio(data=bytes([at]))] if at % 3 == 1 else ()) for at in range(9)
    ]
    for piece in sent:
        replay.record(piece)
    kept = replay.items()
    assert b"".join(piece.data for piece in kept) == b"00" * 9
    assert [heard.data for piece in kept for heard in piece.heard] == [bytes([at]) for at in (1, 4, 7)]
    # Later pieces may join one with the other's audio, which then still comes with its own.
    assert [len(piece.data) for piece in kept] == [2, 6, 6, 4]


def relayed(index: int, version: int, *, carries: bool = False) -> RelayedBlock:
    block = Block(index=index, conditions=version, features=Tensor(dtype="uint8", shape=[1], data=bytes([index])))
    block.heard.data, block.face_motion.data = bytes([index, 1]), bytes([index, 2])
    if carries:
        block.carried.version = version
    return RelayedBlock.from_bytes(block.SerializeToString())


def carried(replay: BlockReplay) -> list[tuple[int, int | None]]:
    """Return index and carried version of each block that a rebuilt stream receives."""
    blocks = [Block.FromString(b"".join(each.parts())) for each in replay.items() if isinstance(each, RelayedBlock)]
    inputs = [(each.features.data, each.heard.data, each.face_motion.data) for each in blocks]
    assert inputs == [tuple(bytes((each.index, *more)) for more in ((), (1,), (2,))) for each in blocks]
    return [(each.index, each.carried.version if each.HasField("carried") else None) for each in blocks]


def test_the_first_block_of_a_rebuilt_stream_carries_its_conditions() -> None:
    replay = BlockReplay()
    replay.set_window(DenoiseOpened(history_blocks=1))
    sent = [relayed(index, index // 3, carries=index % 3 == 0) for index in range(6)]
    replayed = []
    for index, block in enumerate(sent):
        replay.record(block)
        replayed.append(carried(replay))
        assert replay.accept(RelayedBlock(Block(index=index))) == index
    assert replayed[:3] == [[(0, 0)], [(0, 0), (1, None)], [(1, 0), (2, None)]]
    assert replayed[3:] == [[(2, 0), (3, 1)], [(3, 1), (4, None)], [(4, 1), (5, None)]]
    assert [each.head.HasField("carried") for each in sent] == [True, False, False, True, False, False]


def test_conditions_outlive_the_blocks_that_are_dropped() -> None:
    replay = BlockReplay()
    replay.record(relayed(0, 7, carries=True))
    replay.accept(RelayedBlock(Block(index=0)))
    assert replay.items() == []
    replay.record(relayed(1, 7))
    assert carried(replay) == [(1, 7)]
    assert Conditions(version=7) == replay.items()[0].head.carried  # type: ignore[union-attr]
