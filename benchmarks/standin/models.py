"""Stand-in streaming models: `open` a session's state, `step` item by item, on messages instead of tensors."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from avatar.rpc.wire import RelayedBlock, serialize_tensor
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

    def step(self, item: Timed, state: AudioState) -> list[RelayedBlock]:
        """Return the blocks that a piece completes."""
        piece, blocks = item.message, list[RelayedBlock]()
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

    def _encode(self, state: AudioState) -> list[RelayedBlock]:
        index, audio = state.next_block, bytes(state.data[: self._block_bytes])
        del state.data[: self._block_bytes]
        state.next_block += 1
        if index < state.first_answer:
            return []
        features = self._step.run(lambda: self._content.features_of(audio))
        tensor = Tensor(dtype="bfloat16", shape=self._content.features_shape)
        head = Block(index=index, statistics=index.to_bytes(8, "little"))
        return [RelayedBlock(head, serialize_tensor("features", tensor, memoryview(features)))]


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

    def _run(self, block: RelayedBlock, state: BlockState, work: Callable[[], Any]) -> Any:
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

    def step(self, item: Timed, state: BlockState) -> RelayedBlock:
        block: RelayedBlock = item.message
        features = elements(block, "features")
        if len(features) != self._content.features_bytes:
            raise ValueError(f"{len(features)} bytes of features, expected {self._content.features_bytes}")
        latent = elements(block, "latent") if self._level else self._content.initial_latent(features)
        if len(latent) != self._content.latent_bytes:
            raise ValueError(f"{len(latent)} bytes of latent at level {self._level}")
        denoised = self._run(block, state, lambda: content.denoise(np.frombuffer(latent, np.uint8), self._level))
        tensor = Tensor(dtype="bfloat16", shape=self._content.latent_shape)
        head = Block(index=block.index, traceparent=block.head.traceparent)
        return RelayedBlock(head, latent=serialize_tensor("latent", tensor, memoryview(denoised)))


class DecoderModel(BlockModel):
    """Latents in; one fragment per block out, or raw frames if the stream is opened with `rgb24`."""

    def __init__(self, step: Step, opened: vae_pb2.OpenDecode, made: Content = PUBLIC) -> None:
        super().__init__(step, opened.first_block, made)
        self._is_fragmented = opened.encoding == "fmp4"

    def step(self, item: Timed, state: BlockState) -> list[Frame]:
        block: RelayedBlock = item.message
        first, count = self._content.first_frame(block.index), self._content.num_frames(block.index)
        latent = np.frombuffer(elements(block, "latent"), np.uint8)
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


def elements(block: RelayedBlock, name: str) -> bytes | memoryview:
    """Return the elements of a block's tensor; none if it lacks the tensor. name: of the block's field."""
    sent = block.tensor(name)
    return sent[1] if sent else b""
