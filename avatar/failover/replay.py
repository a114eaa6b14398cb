"""What rebuilds a stream at another worker: what it was given and has not answered, and some of what came before.

A history keeps messages unopened, and knows by their numbers which answers are repeats.
"""

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from google.protobuf.message import Message

from avatar.rpc.wire import RelayedBlock
from avatar.worker.v1 import audio_pb2, types_pb2

Item_contra = TypeVar("Item_contra", contravariant=True)
Item_co = TypeVar("Item_co", covariant=True)
Item = TypeVar("Item", bound=Message | RelayedBlock)
Answer_contra = TypeVar("Answer_contra", contravariant=True)


class Replay(Protocol[Item, Answer_contra]):
    """The history of one stream."""

    def sent(self, item: Item) -> None:
        """The stream is given an item."""

    def again(self) -> Sequence[Item]:
        """What a stream that is rebuilt is given first, in order."""

    def took(self, answer: Answer_contra) -> int | None:
        """The block of an answer, None if it is a repeat."""

    @property
    def is_waiting(self) -> bool:
        """Whether an answer is due."""


class BlockReplay:
    """The history of a stream of blocks, each answered with a block or with its frames.

    next_block: the first that is not answered, or not with all of its frames. num_past: blocks before it that are kept.
    """

    def __init__(self, next_block: int = 0) -> None:
        self.next_block = next_block
        self.num_past = 0
        self._next_frame = 0
        self._kept: deque[types_pb2.Block | RelayedBlock] = deque()

    @property
    def first_block(self) -> int:
        """The block that a stream which is rebuilt begins with."""
        return self._kept[0].index if self._kept else self.next_block

    @property
    def is_waiting(self) -> bool:
        return bool(self._kept) and self._kept[-1].index >= self.next_block

    def sent(self, block: types_pb2.Block | RelayedBlock) -> None:
        self._kept.append(block)

    def again(self) -> Sequence[types_pb2.Block | RelayedBlock]:
        return [_urgent(block) for block in self._kept]

    def took(self, answer: types_pb2.Block | types_pb2.Frame) -> int | None:
        if isinstance(answer, types_pb2.Block):
            return self._took_all_of(answer.index)
        if answer.index < self._next_frame:
            return None
        self._next_frame = answer.index + 1
        if answer.is_last:
            self._took_all_of(answer.block)
        return answer.block

    def _took_all_of(self, block: int) -> int | None:
        if block < self.next_block:
            return None
        self.next_block = block + 1
        while self._kept and self._kept[0].index < self.next_block - self.num_past:
            self._kept.popleft()
        return block


class AudioReplay:
    """The history of the stream of sound: pieces, none of which reaches into two blocks, are answered with blocks.

    block_bytes: of a block's sound. next_block: the first that is not answered. num_past: blocks before it whose sound
    is kept. statistics: what the stage has accumulated by the last block that it has answered.
    """

    def __init__(self, sample_bytes: int, rate_hz: int, block_s: float, statistics: bytes) -> None:
        self.next_block = 0
        self.num_past = 0
        self.statistics = statistics
        self._bytes_a_s = sample_bytes * rate_hz
        self._block_s = block_s
        self._due_s = math.inf
        self._num_bytes = 0
        self._completed = -1
        # With the block that each begins in.
        self._kept: deque[tuple[int, audio_pb2.AudioPiece]] = deque()

    def keep_s(self, history_s: float, lookahead_s: float) -> None:
        """So much sound before a block rebuilds the stream, and so much behind it is heard for it."""
        self.num_past = math.ceil(history_s / self._block_s - 1e-6)
        # Rounding and what a resampler holds back are less than a block.
        self._due_s = lookahead_s + self._block_s

    @property
    def first_block(self) -> int:
        """The block that a stream which is rebuilt begins with."""
        return max(0, self.next_block - self.num_past)

    @property
    def is_waiting(self) -> bool:
        heard_s = self._num_bytes / self._bytes_a_s - (self.next_block + 1) * self._block_s
        return self._completed >= self.next_block or heard_s >= self._due_s

    def sent(self, piece: audio_pb2.AudioPiece) -> None:
        self._kept.append((self._block_at(self._num_bytes), piece))
        self._num_bytes += len(piece.data)
        if piece.HasField("completes"):
            self._completed = piece.completes

    def again(self) -> Sequence[audio_pb2.AudioPiece]:
        return [_urgent(piece) for block, piece in self._kept if block >= self.first_block]

    def took(self, block: types_pb2.Block) -> int | None:
        if block.index < self.next_block:
            return None
        self.next_block = block.index + 1
        self.statistics = block.statistics
        while self._kept and self._kept[0][0] < self.first_block:
            self._kept.popleft()
        return block.index

    def _block_at(self, num_bytes: int) -> int:
        """The block that the sound behind so many bytes lies in."""
        return int((num_bytes / self._bytes_a_s + 1e-9) / self._block_s)


def _urgent(item: Item) -> Item:
    """An item that is sent again: what was not in a hurry then is late now."""
    message: Any = item.head if isinstance(item, RelayedBlock) else item
    if message.HasField("slack_s"):
        message.slack_s = 0.0
    return item
