"""Tests of services.gateway.stream.live_stream, over stand-in stages that a test holds and releases."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any, cast

import pytest

from avatar.aio import background
from avatar.rpc.wire import RelayedBlock
from avatar.settings import GatewaySettings
from avatar.v1 import avatar_service_pb2 as api
from avatar.worker.v1 import types_pb2
from services.gateway.options import StreamOptions
from services.gateway.stages import SessionStages
from services.gateway.stream.live_stream import LiveStream
from tests.product import CLOSE, END_TURN, pieces
from tests.services.gateway.clock import settled

BLOCK_BYTES = 2 * 7680
OFFLINE = StreamOptions(encoding="pcm16", rate_hz=16000, num_channels=1, video="rgb24")
LIVE = replace(OFFLINE, is_live=True, returns_audio=True)
SESSION = types_pb2.Session(frame_rate_hz=25, block_frames=12)


def sent(item: Any) -> Any:
    """An item as a worker reads it."""
    if isinstance(item, RelayedBlock):
        return item.to_pb()
    return type(item).FromString(item.SerializeToString())


def received(block: types_pb2.Block) -> RelayedBlock:
    """A block as a worker's answer arrives."""
    return RelayedBlock.from_bytes(block.SerializeToString())


class HeldStage:
    """A stage that takes all items, and answers each one when the test releases it."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.seen: list[Any] = []
        self.closed = types_pb2.Closed()
        self.on_rebuilt: Any = None
        self.lost_at_s = -math.inf
        self.is_answer_due = False
        self.gate = asyncio.Semaphore(0)
        self.sent_ahead: list[int] = []

    def prefill(self, conditions: types_pb2.Conditions) -> None:
        self.sent_ahead.append(conditions.version)

    def release(self, count: int = 1000) -> None:
        for _ in range(count):
            self.gate.release()

    async def __call__(self, items: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
        taken: asyncio.Queue[Any] = asyncio.Queue()

        async def take() -> None:
            try:
                async with aclosing(items):
                    async for item in items:
                        self.seen.append(sent(item))
                        taken.put_nowait(item)
            finally:
                taken.put_nowait(None)

        async with background(take()) as taking:
            while item := await taken.get():
                for answer in self.answers(item):
                    await self.gate.acquire()
                    yield answer
            taking.result()

    def answers(self, item: Any) -> list[Any]:
        return [self.answer(item)]

    def answer(self, item: Any) -> Any:
        is_update = self.stage == "denoiser-1" and item.index == 0  # the last level answers block 0 with the new sink
        carried = types_pb2.Conditions(version=1) if is_update else None
        return received(types_pb2.Block(index=item.index, latent=types_pb2.Tensor(dtype="float32"), carried=carried))


class Decoder(HeldStage):
    """A stage that answers a block with one frame."""

    def answer(self, item: Any) -> Any:
        return types_pb2.Frame(block=item.index, is_last=True)


class LatentDecoder(Decoder):
    """A stage that answers a block with three groups of frames, each when it is released."""

    def answers(self, item: Any) -> list[Any]:
        counts = (1 if item.index == 0 else 4, 4, 4)
        return [types_pb2.Frame(block=item.index, num_frames=n, is_last=i == 2) for i, n in enumerate(counts)]


class Encoder(HeldStage):
    """An audio stage that answers every 0.48 s of audio, and the rest of it, with a block, without being released."""

    async def __call__(self, items: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
        num_bytes = num_blocks = 0
        self.release()
        async with aclosing(super().__call__(items)) as pieces:
            async for piece in pieces:
                num_bytes += len(piece.data)
                if piece.HasField("completes"):
                    assert num_bytes == (piece.completes + 1) * BLOCK_BYTES
                while num_bytes >= (num_blocks + 1) * BLOCK_BYTES:
                    yield received(types_pb2.Block(index=num_blocks, features=types_pb2.Tensor(dtype="float32")))
                    num_blocks += 1
            if num_bytes > num_blocks * BLOCK_BYTES:
                yield received(types_pb2.Block(index=num_blocks, features=types_pb2.Tensor(dtype="float32")))

    def answer(self, item: Any) -> Any:
        return item


class Pipeline:
    """A stream over stand-ins: an audio stage, two levels, a VAE stage."""

    def __init__(
        self,
        sink_update_block: int | None = None,
        options: StreamOptions = OFFLINE,
        now: Callable[[], float] = time.monotonic,
        **settings: Any,
    ) -> None:
        self.encoder, self.decoder = Encoder("audio"), Decoder("vae")
        self.denoisers = [HeldStage("denoiser-0"), HeldStage("denoiser-1")]
        self.sent: list[api.StreamAvatarResponse] = []
        self.requests: asyncio.Queue[api.StreamAvatarRequest] = asyncio.Queue()
        stages = cast(Any, self.encoder), cast(Any, self.denoisers), cast(Any, self.decoder)
        streams = SessionStages(*stages, remaining_s=[0.0] * 4, sink_update_block=sink_update_block)
        position = types_pb2.Position(next_frame=3)
        given = GatewaySettings(audio_ahead_s=2.0, **settings)
        self.stream = LiveStream(streams, options, SESSION, position, types_pb2.Conditions(), given, now)

    @property
    def admitted(self) -> list[types_pb2.Block]:
        return self.denoisers[0].seen

    def lose(self, stage: HeldStage, first_block: int) -> None:
        """Lose a stage's worker; its stream is rebuilt before a block."""
        stage.lost_at_s = time.monotonic()
        stage.on_rebuilt(first_block)

    @property
    def jumps(self) -> list[int]:
        return [response.frame.index for response in self.sent if response.frame.is_discontinuity]

    @property
    def frames(self) -> list[int]:
        return [response.frame.index for response in self.sent if response.HasField("frame")]

    def release(self) -> None:
        """Let all stages answer everything."""
        for stage in (*self.denoisers, self.decoder):
            stage.release()

    def say(self, num_blocks: float) -> None:
        for request in pieces(bytes(int(num_blocks * BLOCK_BYTES) // 2 * 2)):
            self.requests.put_nowait(request)

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[asyncio.Task[None], None]:
        """The pipeline's task, with a client that is connected."""
        task = asyncio.ensure_future(self.stream.run())
        async with background(self._receive()), background(self.stream.outbox.drain(self._write)):
            self.stream.connect()
            await settled()
            yield task
        task.cancel()
        await asyncio.wait({task})

    async def _receive(self) -> None:
        while not await self.stream.receive(await self.requests.get()):
            await self.stream.wait_for_few_items()

    async def _write(self, response: api.StreamAvatarResponse) -> None:
        self.sent.append(response)


@pytest.mark.parametrize("is_per_block", [False, True])
async def test_frames_are_sent_while_their_block_is_decoded_unless_the_client_wants_them_together(
    is_per_block: bool,
) -> None:
    pipeline = Pipeline(options=replace(LIVE, is_per_block=is_per_block))
    decoder = LatentDecoder("vae")
    pipeline.stream._stages.vae = cast(Any, decoder)
    for denoiser in pipeline.denoisers:
        denoiser.release()
    pipeline.say(2)
    arrived = []  # frames sent, and blocks that the timeline counts as arrived, after each group
    async with pipeline.running():
        for _ in range(3):
            decoder.release(1)
            await settled()
            chunks = [response.chunk.frames for response in pipeline.sent if response.HasField("chunk")]
            num_frames = len(pipeline.frames) + sum(map(len, chunks))
            arrived.append((num_frames, len(pipeline.stream._timeline._latencies)))
    assert arrived == ([(0, 0), (0, 0), (3, 1)] if is_per_block else [(1, 1), (2, 1), (3, 1)])


async def test_blocks_in_flight_are_bounded() -> None:
    pipeline = Pipeline()
    for denoiser in pipeline.denoisers:
        denoiser.release()
    pipeline.say(8)
    async with pipeline.running():
        inside = len(pipeline.denoisers) + 4
        assert len(pipeline.admitted) == inside
        pipeline.decoder.release(1)
        await settled()
        assert len(pipeline.admitted) == inside + 1


async def test_audio_is_read_at_most_the_bound_ahead_of_started_blocks() -> None:
    pipeline = Pipeline()
    pipeline.say(20)
    async with pipeline.running():
        started_s = 0.48 * (len(pipeline.admitted) - 1)
        encoded_s = sum(len(piece.data) for piece in pipeline.encoder.seen) / 32000
        # Two stages hold a block each before the first one is released; admitted blocks count as started.
        assert encoded_s <= started_s + 2.0 + 0.48 * 4
        assert pipeline.requests.qsize() > 0


async def test_the_block_of_the_sink_update_waits_for_block_0_to_be_finished() -> None:
    pipeline = Pipeline(sink_update_block=2)
    pipeline.denoisers[0].release()
    pipeline.decoder.release()
    pipeline.say(4)
    async with pipeline.running():
        assert [block.index for block in pipeline.admitted] == [0, 1]
        pipeline.denoisers[1].release(1)
        await settled()
        assert [block.index for block in pipeline.admitted] == [0, 1, 2, 3]
        assert [block.conditions for block in pipeline.admitted] == [0, 0, 1, 1]


async def test_conditions_go_to_every_level_as_soon_as_they_are_known() -> None:
    pipeline = Pipeline(sink_update_block=2)
    pipeline.denoisers[0].release()
    pipeline.say(1)
    async with pipeline.running():
        assert [each.sent_ahead for each in pipeline.denoisers] == [[0], [0]]
        pipeline.denoisers[1].release(1)
        await settled()
        assert [block.index for block in pipeline.admitted] == [0], "no block is made under them yet"
        assert [each.sent_ahead for each in pipeline.denoisers] == [[0, 1], [0, 1]]


async def test_without_a_sink_update_no_block_waits() -> None:
    pipeline = Pipeline()
    pipeline.denoisers[0].release()
    pipeline.say(3)
    async with pipeline.running():
        assert [(block.index, block.conditions) for block in pipeline.admitted] == [(0, 0), (1, 0), (2, 0)]


async def test_every_level_receives_the_features() -> None:
    pipeline = Pipeline()
    pipeline.release()
    pipeline.say(1)
    async with pipeline.running():
        assert [denoiser.seen[0].HasField("features") for denoiser in pipeline.denoisers] == [True, True]
        assert not pipeline.decoder.seen[0].HasField("features")


async def test_an_interrupt_drops_speech_that_is_not_admitted_and_what_follows_starts_a_block_of_its_own() -> None:
    pipeline = Pipeline()
    pipeline.say(1.5)
    async with pipeline.running():
        pipeline.stream.interrupt()
        pipeline.say(1)
        pipeline.release()
        await settled()
        # Block 0 was admitted and runs through unsent; half of block 1 was there, filled up and dropped.
        assert [block.index for block in pipeline.admitted] == [0, 1]
        assert sum(len(piece.data) for piece in pipeline.encoder.seen) == 3 * BLOCK_BYTES
        assert pipeline.frames == [3]


async def test_nothing_is_admitted_while_no_client_is_connected() -> None:
    pipeline = Pipeline()
    pipeline.release()
    async with pipeline.running():
        pipeline.stream.disconnect()
        pipeline.say(2)
        await settled()
        assert not pipeline.admitted
        pipeline.stream.connect()
        await settled()
        assert [block.index for block in pipeline.admitted] == [0, 1]


async def test_the_end_of_a_turn_completes_its_last_block_and_the_next_turn_starts_a_block() -> None:
    pipeline = Pipeline()
    pipeline.release()
    pipeline.say(0.5)
    pipeline.requests.put_nowait(END_TURN)
    async with pipeline.running():
        assert [block.index for block in pipeline.admitted] == [0]
        pipeline.say(1)
        await settled()
        assert [block.index for block in pipeline.admitted] == [0, 1]


async def test_close_runs_to_the_end() -> None:
    pipeline = Pipeline()
    pipeline.release()
    pipeline.say(3)
    pipeline.requests.put_nowait(CLOSE)
    async with pipeline.running() as task:
        await task
    assert pipeline.frames == [3, 4, 5]
    assert pipeline.stream.position.next_block == 3


async def test_a_worker_that_is_lost_before_the_first_frame_marks_no_discontinuity() -> None:
    pipeline = Pipeline()
    pipeline.say(3)
    async with pipeline.running():
        for stage in (*pipeline.denoisers, pipeline.encoder):
            pipeline.lose(stage, 0)
        pipeline.lose(pipeline.denoisers[0], 1)
        pipeline.release()
        await settled()
        assert (pipeline.frames, pipeline.jumps) == ([3, 4, 5], [])
        pipeline.lose(pipeline.denoisers[1], 3)
        pipeline.say(2)
        await settled()
        assert (pipeline.frames, pipeline.jumps) == ([3, 4, 5, 6, 7], [6])
