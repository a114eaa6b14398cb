"""Stand-ins for the streaming models: `open` a session's state, `step` item by item, on messages instead of tensors."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from avatar.worker.v1 import audio_pb2
from avatar.worker.v1.types_pb2 import Block, Frame, Tensor
from benchmarks.standin import content
from benchmarks.standin.step import Step

# Of a message of features, with its dtype and shape.
FEATURES_WRITTEN = Tensor(dtype="bfloat16", shape=content.FEATURES_SHAPE, data=bytes(content.FEATURES_BYTES)).ByteSize()


@dataclass(frozen=True)
class Due:
    """A message, and when it is due, in seconds of the monotonic clock; None if nobody waits."""

    message: Any
    due_s: float | None = None


@dataclass
class Heard:
    """A stream of sound. next_block: the one that is being filled. first_answer: the first that is answered."""

    next_block: int = 0
    first_answer: int = 0
    data: bytearray = field(default_factory=bytearray)


class Hearing:
    """Sound to features. The end of the sound is a piece of None."""

    def __init__(self, step: Step, open_: audio_pb2.OpenEncode) -> None:
        self._step = step
        self._open = open_

    def open(self, session: object) -> Heard:
        return Heard(self._open.first_block, self._open.first_answer)

    def step(self, item: Due, state: Heard) -> list[Block]:
        """The blocks that a piece completes."""
        piece, made = item.message, list[Block]()
        if piece is not None:
            state.data += piece.data
        while len(state.data) >= content.SOUND_BYTES:
            made += self._encode(state)
        due = state.data if piece is None else piece.HasField("completes") and state.next_block <= piece.completes
        if due:
            state.data += bytes(content.SOUND_BYTES - len(state.data))
            made += self._encode(state)
        return made

    def _encode(self, state: Heard) -> list[Block]:
        index, sound = state.next_block, bytes(state.data[: content.SOUND_BYTES])
        del state.data[: content.SOUND_BYTES]
        state.next_block += 1
        if index < state.first_answer:
            return []
        features = self._step.take(lambda: content.heard(sound))
        tensor = Tensor(dtype="bfloat16", shape=content.FEATURES_SHAPE, data=features)
        return [Block(index=index, features=tensor, statistics=index.to_bytes(8, "little"))]


@dataclass
class Order:
    """A stream of blocks: which one comes next."""

    next_block: int


class _InOrder:
    """Takes blocks one after another, from the one that the stream was opened with."""

    def __init__(self, step: Step, first_block: int) -> None:
        self._step = step
        self._first_block = first_block

    def open(self, session: object) -> Order:
        return Order(self._first_block)

    def _taken(self, block: Block, state: Order, work: Callable[[], bytes]) -> bytes:
        """What the step makes of a block. ValueError if it is not the next one."""
        if block.index != state.next_block:
            raise ValueError(f"block {block.index} came, expected {state.next_block}")
        state.next_block += 1
        return self._step.take(work)


class Level(_InOrder):
    """Blocks with features in, latents out."""

    def __init__(self, step: Step, first_block: int, level: int) -> None:
        super().__init__(step, first_block)
        self._level = level

    def step(self, item: Due, state: Order) -> Block:
        block = item.message
        # Not `features.data`, which would be another copy of them.
        if (size := block.features.ByteSize()) != FEATURES_WRITTEN:
            raise ValueError(f"features are written in {size} bytes, expected {FEATURES_WRITTEN}")
        data = self._taken(block, state, lambda: self._denoise(block))
        latent = Tensor(dtype="bfloat16", shape=content.LATENT_SHAPE, data=data)
        return Block(index=block.index, latent=latent, traceparent=block.traceparent)

    def _denoise(self, block: Block) -> bytes:
        latent = np.frombuffer(block.latent.data, np.uint8) if self._level else content.noise(block.features.data)
        if len(latent) != content.LATENT_BYTES:
            raise ValueError(f"{len(latent)} bytes of latent at level {self._level}")
        return content.denoised(latent, self._level).tobytes()


class Decoding(_InOrder):
    """Latents in, one fragment a block out."""

    def step(self, item: Due, state: Order) -> Frame:
        block = item.message
        data = self._taken(block, state, lambda: self._decode(block))
        return Frame(
            block=block.index,
            index=content.first_frame(block.index),
            is_last=True,
            data=data,
            is_key=True,
            num_frames=content.shown_frames(block.index),
        )

    def _decode(self, block: Block) -> bytes:
        return content.fragment(content.decoded(np.frombuffer(block.latent.data, np.uint8)))
