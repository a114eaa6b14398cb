"""Replays: the items that rebuild a stream at another worker, those not answered yet and some before them.

A replay keeps messages unopened. By their indexes it recognises answers that were passed on before.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from google.protobuf.message import Message

from avatar.rpc.wire import RelayedBlock
from avatar.worker.v1 import audio_pb2, denoiser_pb2, types_pb2, vae_pb2

# Pieces of audio are kept together up to this size, so that tiny ones need no memory each.
MERGED_BYTES = 4096

Item = TypeVar("Item", bound=Message | RelayedBlock)
Answer_contra = TypeVar("Answer_contra", contravariant=True)


class Replay(Protocol[Item, Answer_contra]):
    """The replay of one stream."""

    def set_window(self, opened: Any) -> None:
        """Set how much is kept, from a worker's `opened`."""

    def set_start(self, message: Any) -> None:
        """Set where a rebuilt stream starts, in its `open` message."""

    def record(self, item: Item) -> None:
        """Keep an item that is sent to the stream."""

    def items(self) -> Sequence[Item]:
        """Return the items that a rebuilt stream receives first, in order."""

    def clear(self) -> None:
        """Drop all items: the stream is not rebuilt any more."""

    def accept(self, answer: Answer_contra) -> int | None:
        """Return the block that an answer belongs to, None if the answer is a repeat. Drop items that it settles."""

    @property
    def is_answer_due(self) -> bool:
        """True if the stream has received all that its next answer needs."""


class BlockReplay:
    """The replay of a stream of blocks, each answered with a block or with its frames.

    Conditions are carried by the first block of each version alone. A replay keeps those of its first block, so that
    the first block of a rebuilt stream always carries them.

    next_block: the first block that is not answered, or not with all of its frames.
    num_past_blocks: answered blocks before it that are kept, because the state of the stream depends on them.
    """

    def __init__(self, next_block: int = 0) -> None:
        self.next_block = next_block
        self.num_past_blocks = 0
        self.is_answer_due = False
        self._next_frame = 0
        self._kept: deque[types_pb2.Block | RelayedBlock] = deque()
        self._conditions: types_pb2.Conditions | None = None

    def set_window(self, opened: denoiser_pb2.DenoiseOpened | vae_pb2.DecodeOpened) -> None:
        self.num_past_blocks = opened.history_blocks

    def set_start(self, message: denoiser_pb2.OpenDenoise | vae_pb2.OpenDecode) -> None:
        message.first_block = self._kept[0].index if self._kept else self.next_block

    def record(self, block: types_pb2.Block | RelayedBlock) -> None:
        self._kept.append(block)
        self.is_answer_due = True

    def items(self) -> Sequence[types_pb2.Block | RelayedBlock]:
        items = list(self._kept)
        if items and self._conditions is not None and not _head(items[0]).HasField("carried"):
            items[0] = _with_conditions(items[0], self._conditions)
        return items

    def clear(self) -> None:
        self._kept.clear()
        self._conditions = None

    def accept(self, answer: RelayedBlock | types_pb2.Frame) -> int | None:
        if isinstance(answer, RelayedBlock):
            return self._accept_block(answer.index)
        if answer.index < self._next_frame:
            return None
        self._next_frame = answer.index + 1
        if answer.is_last:
            self._accept_block(answer.block)
        return answer.block

    def _accept_block(self, index: int) -> int | None:
        if index < self.next_block:
            return None
        self.next_block = index + 1
        self.is_answer_due = bool(self._kept) and self._kept[-1].index >= self.next_block
        while self._kept and self._kept[0].index < self.next_block - self.num_past_blocks:
            head = _head(self._kept.popleft())
            if head.HasField("carried"):
                self._conditions = head.carried
        return index


class AudioReplay:
    """The replay of a stream of audio: pieces, none of which reaches into two blocks, are answered with blocks.

    next_block: the first block that is not answered. num_past_blocks: blocks before it whose audio is kept.
    statistics: running statistics of the audio stage, as of the last block that it answered.
    """

    def __init__(self, sample_bytes: int, rate_hz: int, block_s: float, lookahead_s: float, statistics: bytes) -> None:
        """sample_bytes: of one sample of all channels. block_s: duration of a block. lookahead_s: seconds of audio
        after a block's end that its features depend on. statistics: of the audio stage before the first block.
        """
        self.next_block = 0
        self.num_past_blocks = 0
        self.statistics = statistics
        self._bytes_per_s = sample_bytes * rate_hz
        self._block_s = block_s
        # Rounding and the samples that a resampler holds back come to less than a block.
        self._answer_after_s = lookahead_s + block_s
        self._num_bytes = 0
        self._completed = -1
        # Each piece with the index of the block that it starts in.
        self._kept: deque[tuple[int, audio_pb2.AudioPiece]] = deque()

    def set_window(self, opened: audio_pb2.EncodeOpened) -> None:
        self.num_past_blocks = math.ceil(opened.history_s / self._block_s - 1e-6)

    def set_start(self, message: audio_pb2.OpenEncode) -> None:
        message.first_block, message.first_answer = self.first_block, self.next_block
        message.statistics = self.statistics

    @property
    def first_block(self) -> int:
        """Index of the block that a rebuilt stream starts with."""
        return max(0, self.next_block - self.num_past_blocks)

    def record(self, piece: audio_pb2.AudioPiece) -> None:
        block = int((self._num_bytes / self._bytes_per_s + 1e-9) / self._block_s)
        self._keep(block, piece)
        self._num_bytes += len(piece.data)
        if piece.HasField("completes"):
            self._completed = piece.completes

    def _keep(self, block: int, piece: audio_pb2.AudioPiece) -> None:
        if self._kept and not piece.HasField("completes") and not piece.heard:
            last_block, last = self._kept[-1]
            is_small = len(last.data) + len(piece.data) <= MERGED_BYTES
            if is_small and last_block == block and not last.HasField("completes"):
                self._kept[-1] = (block, audio_pb2.AudioPiece(data=last.data + piece.data, heard=last.heard))
                return
        self._kept.append((block, piece))

    def items(self) -> Sequence[audio_pb2.AudioPiece]:
        pieces = [piece for block, piece in self._kept if block >= self.first_block]
        for piece in pieces:
            if piece.HasField("slack_s"):
                piece.slack_s = 0.0  # a piece that is sent again is late
        return pieces

    def clear(self) -> None:
        self._kept.clear()

    def accept(self, block: RelayedBlock) -> int | None:
        if block.index < self.next_block:
            return None
        self.next_block = block.index + 1
        self.statistics = block.head.statistics
        while self._kept and self._kept[0][0] < self.first_block:
            self._kept.popleft()
        return block.index

    @property
    def is_answer_due(self) -> bool:
        after_s = self._num_bytes / self._bytes_per_s - (self.next_block + 1) * self._block_s
        return self._completed >= self.next_block or after_s >= self._answer_after_s


def _head(item: Any) -> Any:
    """The message that holds an item's small fields."""
    return item.head if isinstance(item, RelayedBlock) else item


def _with_conditions(
    block: types_pb2.Block | RelayedBlock, conditions: types_pb2.Conditions
) -> types_pb2.Block | RelayedBlock:
    """A copy of a block that carries the conditions; the block itself goes on to the next stage without them."""
    head = types_pb2.Block()
    head.CopyFrom(_head(block))
    head.carried.CopyFrom(conditions)
    return replace(block, head=head) if isinstance(block, RelayedBlock) else head
