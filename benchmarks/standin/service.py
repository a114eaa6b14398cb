"""Servicers of the stand-in workers: the real worker contract over the stand-in models."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import AbstractContextManager, aclosing
from dataclasses import dataclass
from typing import Any

import grpc.aio

from avatar.rpc.codec import load_to_pb
from avatar.rpc.interceptor import Context, max_active, parts, receive_open
from avatar.rpc.wire import RelayedBlock
from avatar.runtime.admission import AdmissionControl
from avatar.runtime.device_memory import Reservation
from avatar.runtime.device_queue import DeviceQueue
from avatar.runtime.pipeline import StreamUsage, flatten, local
from avatar.worker.v1 import (
    audio_pb2,
    audio_pb2_grpc,
    denoiser_pb2,
    denoiser_pb2_grpc,
    types_pb2,
    vae_pb2,
    vae_pb2_grpc,
)
from benchmarks.standin import content
from benchmarks.standin.content import PUBLIC, Content
from benchmarks.standin.models import AudioModel, DecoderModel, LevelModel, Timed
from benchmarks.standin.step import Step

DIGEST = "stand-in"
# Pretend that this many steps of the known time were measured, so that single slow steps on a busy machine do not make
# admission control refuse streams.
WARM_STEPS = 50


@dataclass
class Stage:
    """A stage's device queue and admission control, as in the product; only the step is simulated.

    step: the simulated computation of a block. queue: runs blocks, earliest deadline first. limit: streams at a time.
    history_blocks: past blocks that rebuild a stream. content: sizes of its blocks.
    """

    name: str
    step: Step
    queue: DeviceQueue
    limit: int
    history_blocks: int
    content: Content = PUBLIC

    def __post_init__(self) -> None:
        self.admission = AdmissionControl(self.limit, self.name, self.queue.load, self.content.block_s)
        self.changed = asyncio.Event()
        self.admission.on_change = self.changed.set
        for _ in range(WARM_STEPS):
            self.admission.step_times.append(self.step.step_s)

    def admit(self, opened: Any) -> Awaitable[AbstractContextManager[Reservation]]:
        """Accept the stream of an `open` message. NoCapacity if it is refused."""
        limits = {"max_active": max_active(opened), "claimed_us": opened.claimed_us}
        return self.admission.admit(opened.session_id, is_live=opened.is_live, **limits)

    async def stream(
        self, model: Any, items: AsyncGenerator[Any, None], usage: StreamUsage, *, is_live: bool
    ) -> AsyncGenerator[Any, None]:
        """Yield one session's answers."""
        session: Any = None  # the stand-in models need no session
        live_block_s = self.content.block_s if is_live else None
        stage = local(model, session, self.queue, usage, live_block_s=live_block_s)
        async with aclosing(stage(_timed(items))) as answers:
            async for answer in answers:
                yield answer


async def _timed(messages: AsyncGenerator[Any, None]) -> AsyncGenerator[Timed, None]:
    """Yield each message with its deadline."""
    async with aclosing(messages):
        async for message in messages:
            head = message.head if isinstance(message, RelayedBlock) else message
            has_deadline = head is not None and head.HasField("slack_s")
            yield Timed(message, time.monotonic() + head.slack_s if has_deadline else None)


class AudioServicer(audio_pb2_grpc.AudioServiceServicer):
    """Serves audio: features that repeat the audio. It says that it needs a lookahead, and does not look at it."""

    service_name = "avatar.worker.v1.AudioService"
    stage = "audio"

    def __init__(self, stage: Stage, lookahead_s: float = 0.0) -> None:
        self._stage, self._lookahead_s = stage, lookahead_s
        self.changed = stage.changed

    def add_to(self, server: grpc.aio.Server) -> None:
        audio_pb2_grpc.add_AudioServiceServicer_to_server(self, server)

    def info(self) -> audio_pb2.AudioServiceGetInfoResponse:
        """Describe the worker as it is now."""
        return audio_pb2.AudioServiceGetInfoResponse(
            encoder=DIGEST,
            digest=DIGEST,
            block_frames=self._stage.content.block_frames,
            lookahead_s=self._lookahead_s,
            capacity=self._stage.admission.capacity,
            active=self._stage.admission.active,
            max_streams=self._stage.limit,
            step_s=self._stage.admission.step_times.p90_s,
            load=load_to_pb(self._stage.queue.load),
        )

    async def GetInfo(
        self, request: audio_pb2.AudioServiceGetInfoRequest, context: Context
    ) -> audio_pb2.AudioServiceGetInfoResponse:
        return self.info()

    async def Encode(
        self, requests: AsyncIterator[audio_pb2.EncodeRequest], context: Context
    ) -> AsyncGenerator[Any, None]:
        opened: audio_pb2.OpenEncode = await receive_open(requests)
        if (opened.encoding, opened.num_channels) != ("pcm16", 1):
            raise ValueError(f"audio must be pcm16 with one channel, got {opened.encoding} with {opened.num_channels}")
        with await self._stage.admit(opened):
            history_s = self._stage.history_blocks * self._stage.content.block_s
            yield audio_pb2.EncodeResponse(opened=audio_pb2.EncodeOpened(history_s=history_s))
            usage, num_blocks = StreamUsage(self._stage.admission.step_times), 0
            answers = flatten(
                self._stage.stream(
                    AudioModel(self._stage.step, opened, self._stage.content),
                    _pieces(requests),
                    usage,
                    is_live=opened.is_live,
                )
            )
            async with aclosing(answers) as blocks:
                async for block in blocks:
                    num_blocks += 1
                    yield block
            yield audio_pb2.EncodeResponse(closed=types_pb2.Closed(num_blocks=num_blocks, busy_s=usage.busy_s))


async def _pieces(
    requests: AsyncIterator[audio_pb2.EncodeRequest],
) -> AsyncGenerator[audio_pb2.AudioPiece | None, None]:
    """Yield the pieces, then None."""
    async with aclosing(parts(requests, "piece")) as pieces:
        async for piece in pieces:
            yield piece
    yield None


class DenoiserServicer(denoiser_pb2_grpc.DenoiserServiceServicer):
    """Serves one level."""

    service_name = "avatar.worker.v1.DenoiserService"
    stage = "denoiser"

    def __init__(self, stage: Stage, level: int) -> None:
        self._stage = stage
        self.changed = stage.changed
        self._level = level

    def add_to(self, server: grpc.aio.Server) -> None:
        denoiser_pb2_grpc.add_DenoiserServiceServicer_to_server(self, server)

    def info(self) -> denoiser_pb2.DenoiserServiceGetInfoResponse:
        """Describe the worker as it is now."""
        return denoiser_pb2.DenoiserServiceGetInfoResponse(
            levels=[self._level],
            num_levels=self._stage.content.num_levels,
            num_trained_levels=content.NUM_LEVELS,
            schedule=[1 - level / content.NUM_LEVELS for level in range(self._stage.content.num_levels)],
            block_frames=self._stage.content.block_frames,
            inputs=self._stage.content.inputs,
            digest=DIGEST,
            capacity=self._stage.admission.capacity,
            active=self._stage.admission.active,
            max_streams=self._stage.limit,
            step_s=self._stage.admission.step_times.p90_s,
            load=load_to_pb(self._stage.queue.load),
        )

    async def GetInfo(
        self, request: denoiser_pb2.DenoiserServiceGetInfoRequest, context: Context
    ) -> denoiser_pb2.DenoiserServiceGetInfoResponse:
        return self.info()

    async def Denoise(
        self, requests: AsyncIterator[denoiser_pb2.DenoiseRequest], context: Context
    ) -> AsyncGenerator[Any, None]:
        opened: denoiser_pb2.OpenDenoise = await receive_open(requests)
        if opened.level != self._level:
            raise ValueError(f"level {opened.level} is not served here, only {self._level}")
        with await self._stage.admit(opened):
            yield denoiser_pb2.DenoiseResponse(
                opened=denoiser_pb2.DenoiseOpened(
                    history_blocks=self._stage.history_blocks, num_levels=self._stage.content.num_levels, digest=DIGEST
                )
            )
            usage, num_blocks = StreamUsage(self._stage.admission.step_times), 0
            level = LevelModel(self._stage.step, opened.first_block, self._level, self._stage.content)
            async with aclosing(
                self._stage.stream(level, parts(requests, "block"), usage, is_live=opened.is_live)
            ) as blocks:
                async for block in blocks:
                    num_blocks += 1
                    yield block
            yield denoiser_pb2.DenoiseResponse(closed=types_pb2.Closed(num_blocks=num_blocks, busy_s=usage.busy_s))


class VaeServicer(vae_pb2_grpc.VaeServiceServicer):
    """Serves decoding. Accepts any picture as a reference."""

    service_name = "avatar.worker.v1.VaeService"
    stage = "vae"

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.changed = stage.changed

    def add_to(self, server: grpc.aio.Server) -> None:
        vae_pb2_grpc.add_VaeServiceServicer_to_server(self, server)

    def info(self) -> vae_pb2.VaeServiceGetInfoResponse:
        """Describe the worker as it is now."""
        return vae_pb2.VaeServiceGetInfoResponse(
            digest=DIGEST,
            width=content.SIDE,
            height=content.SIDE,
            fit="cover",
            frame_rate_hz=content.FRAME_RATE_HZ,
            block_frames=self._stage.content.block_frames,
            capacity=self._stage.admission.capacity,
            active=self._stage.admission.active,
            max_streams=self._stage.limit,
            encodings=["fmp4", "rgb24"],
            step_s=self._stage.admission.step_times.p90_s,
            load=load_to_pb(self._stage.queue.load),
        )

    async def GetInfo(
        self, request: vae_pb2.VaeServiceGetInfoRequest, context: Context
    ) -> vae_pb2.VaeServiceGetInfoResponse:
        return self.info()

    async def EncodeReference(
        self, request: vae_pb2.EncodeReferenceRequest, context: Context
    ) -> vae_pb2.EncodeReferenceResponse:
        latent = types_pb2.Tensor(dtype="uint8", shape=[1, 1, 1, 1], data=b"\0")
        return vae_pb2.EncodeReferenceResponse(
            reference=types_pb2.Reference(
                id="0" * 64,
                width=content.SIDE,
                height=content.SIDE,
                fit="cover",
                motion=latent,
                sink=latent,
                frame_rate_hz=content.FRAME_RATE_HZ,
                block_frames=self._stage.content.block_frames,
            )
        )

    async def Decode(
        self, requests: AsyncIterator[vae_pb2.DecodeRequest], context: Context
    ) -> AsyncGenerator[vae_pb2.DecodeResponse, None]:
        opened: vae_pb2.OpenDecode = await receive_open(requests)
        with await self._stage.admit(opened):
            yield vae_pb2.DecodeResponse(
                opened=vae_pb2.DecodeOpened(history_blocks=self._stage.history_blocks, init_segment=b"init")
            )
            usage, num_blocks = StreamUsage(self._stage.admission.step_times), 0
            decoder = DecoderModel(self._stage.step, opened, self._stage.content)
            answers = flatten(self._stage.stream(decoder, parts(requests, "block"), usage, is_live=opened.is_live))
            async with aclosing(answers) as frames:
                async for frame in frames:
                    num_blocks += frame.is_last
                    yield vae_pb2.DecodeResponse(frame=frame)
            yield vae_pb2.DecodeResponse(closed=types_pb2.Closed(num_blocks=num_blocks, busy_s=usage.busy_s))
