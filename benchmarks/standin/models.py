"""Stand-in streaming models: `open` a session's state, `step` item by item, on messages instead of tensors."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from avatar.worker.v1 import audio_pb2, vae_pb2
from avatar.worker.v1.types_pb2 import Block, Frame, Tensor
from benchmarks.standin import content
from benchmarks.standin.content import PUBLIC, Content
from benchmarks.standin.step import Step


@dataclass(frozen=True)
class Timed:
    """A message and its deadline, in seconds of the monotonic clock; None without a deadline."""

    message: Any
    due_s: float | None = None


@dataclass
class AudioState:
    """An audio stream. next_block: the one being filled. first_answer: the first that is answered."""

    next_block: int = 0
    first_answer: int = 0
    data: bytearray = field(default_factory=bytearray)


class AudioModel:
    """Audio in, features out. A piece of None ends the audio. Ignores the context after a block."""

    def __init__(self, step: Step, opened: audio_pb2.OpenEncode, made: Content = PUBLIC) -> None:
        self._step = step
        self._opened = opened
        self._content = made
        self._block_bytes = made.block_bytes(opened.rate_hz)

    def open(self, session: object) -> AudioState:
        return AudioState(self._opened.first_block, self._opened.first_answer)

    def step(self, item: Timed, state: AudioState) -> list[Block]:
        """Return the blocks that a piece completes."""
        piece, blocks = item.message, list[Block]()
        if piece is not None:
            state.data += piece.data
        while len(state.data) >= self._block_bytes:
            blocks += self._encode(state)
        is_cut_here = (
            state.data if piece is None else piece.HasField("completes") and state.next_block <= piece.completes
        )
        if is_cut_here:
            state.data += bytes(self._block_bytes - len(state.data))
            blocks += self._encode(state)
        return blocks

    def _encode(self, state: AudioState) -> list[Block]:
        index, audio = state.next_block, bytes(state.data[: self._block_bytes])
        del state.data[: self._block_bytes]
        state.next_block += 1
        if index < state.first_answer:
            return []
        features = self._step.run(lambda: self._content.features_of(audio))
        tensor = Tensor(dtype="bfloat16", shape=self._content.features_shape, data=features)
        return [Block(index=index, features=tensor, statistics=index.to_bytes(8, "little"))]


@dataclass
class BlockState:
    """A stream of blocks: the index of the next one."""

    next_block: int


class BlockModel:
    """Takes blocks in order, from the one that the stream was opened with."""

    def __init__(self, step: Step, first_block: int, made: Content) -> None:
        self._step = step
        self._first_block = first_block
        self._content = made

    def open(self, session: object) -> BlockState:
        return BlockState(self._first_block)

    def _run(self, block: Block, state: BlockState, work: Callable[[], bytes]) -> bytes:
        """Run a step on a block. Raises ValueError if it is not the next one."""
        if block.index != state.next_block:
            raise ValueError(f"block {block.index} came, expected {state.next_block}")
        state.next_block += 1
        return self._step.run(work)


class LevelModel(BlockModel):
    """Blocks with features in, latents out."""

    def __init__(self, step: Step, first_block: int, level: int, made: Content = PUBLIC) -> None:
        super().__init__(step, first_block, made)
        self._level = level
        # A features message with its dtype and shape.
        message = Tensor(dtype="bfloat16", shape=made.features_shape, data=bytes(made.features_bytes))
        self._features_bytes = message.ByteSize()

    def step(self, item: Timed, state: BlockState) -> Block:
        block = item.message
        # `features.data` would copy them again.
        if (size := block.features.ByteSize()) != self._features_bytes:
            raise ValueError(f"features have {size} bytes, expected {self._features_bytes}")
        data = self._run(block, state, lambda: self._denoise(block))
        latent = Tensor(dtype="bfloat16", shape=self._content.latent_shape, data=data)
        return Block(index=block.index, latent=latent, traceparent=block.traceparent)

    def _denoise(self, block: Block) -> bytes:
        latent = (
            np.frombuffer(block.latent.data, np.uint8)
            if self._level
            else self._content.initial_latent(block.features.data)
        )
        if len(latent) != self._content.latent_bytes:
            raise ValueError(f"{len(latent)} bytes of latent at level {self._level}")
        return content.denoise(latent, self._level).tobytes()


class DecoderModel(BlockModel):
    """Latents in; one fragment per block out, or raw frames if the stream is opened with `rgb24`."""

    def __init__(self, step: Step, opened: vae_pb2.OpenDecode, made: Content = PUBLIC) -> None:
        super().__init__(step, opened.first_block, made)
        self._is_fragmented = opened.encoding == "fmp4"

    def step(self, item: Timed, state: BlockState) -> list[Frame]:
        block = item.message
        first, count = self._content.first_frame(block.index), self._content.num_frames(block.index)
        latent = np.frombuffer(block.latent.data, np.uint8)
        data = self._run(block, state, lambda: content.fragment_of(content.decode(latent)))
        if self._is_fragmented:
            return [Frame(block=block.index, index=first, is_last=True, data=data, is_key=True, num_frames=count)]
        return [
            Frame(
                block=block.index,
                index=first + number,
                is_last=number == count - 1,
                data=pixels,
                is_key=True,
                num_frames=1,
            )
            for number, pixels in enumerate(content.decode_rgb(latent, count))
        ]
