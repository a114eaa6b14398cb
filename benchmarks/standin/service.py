"""Stand-in workers on the wire: the real services' contract over the stand-in models."""

import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc.aio

from avatar.rpc.server import Context, opening, parts
from avatar.runtime.admission import AdmissionControl, StreamUsage
from avatar.runtime.device_queue import DeviceQueue
from avatar.runtime.pipeline import flatten, local
from avatar.types import BLOCK_FRAMES, BLOCK_S
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
from benchmarks.standin.models import Decoding, Due, Hearing, Level
from benchmarks.standin.step import Step

DIGEST = "stand-in"
SIDE = 64
# What a step takes is known; steps that others' work on this machine lengthens refuse nobody until they are the rule.
WARM_STEPS = 50


@dataclass
class Stage:
    """What the three services have in common, the product's but for what a step does.

    step: what a block takes. queue: of the device. history_blocks: that rebuild a stream.
    """

    name: str
    step: Step
    queue: DeviceQueue
    limit: int
    history_blocks: int

    def __post_init__(self) -> None:
        self.admission = AdmissionControl(self.limit, self.name, self.queue.load)
        for _ in range(WARM_STEPS):
            self.admission.step_times.add(self.step.step_s)

    async def stream(
        self, model: Any, items: AsyncGenerator[Any, None], usage: StreamUsage, *, is_live: bool
    ) -> AsyncGenerator[Any, None]:
        """One session's answers."""
        session: Any = None  # stand-ins know all from `open`
        stage = local(model, session, self.queue, usage, is_live=is_live)
        async with aclosing(stage(_due(items))) as answers:
            async for answer in answers:
                self.admission.step_times.add(usage.step_s)
                yield answer


async def _due(messages: AsyncGenerator[Any, None]) -> AsyncGenerator[Due, None]:
    """Each message, and when it is due."""
    async with aclosing(messages):
        async for message in messages:
            is_awaited = message is not None and message.HasField("slack_s")
            yield Due(message, time.monotonic() + message.slack_s if is_awaited else None)


class AudioServicer(audio_pb2_grpc.AudioServiceServicer):
    """Features that repeat the sound; hears nothing behind a block."""

    service_name = "avatar.worker.v1.AudioService"

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def add_to(self, server: grpc.aio.Server) -> None:
        audio_pb2_grpc.add_AudioServiceServicer_to_server(self, server)

    async def GetInfo(
        self, request: audio_pb2.AudioServiceGetInfoRequest, context: Context
    ) -> audio_pb2.AudioServiceGetInfoResponse:
        return audio_pb2.AudioServiceGetInfoResponse(
            encoder=DIGEST,
            digest=DIGEST,
            block_frames=BLOCK_FRAMES,
            capacity=self._stage.admission.capacity,
            active=self._stage.admission.active,
            step_s=self._stage.admission.step_times.p90_s,
        )

    async def Encode(
        self, requests: AsyncIterator[audio_pb2.EncodeRequest], context: Context
    ) -> AsyncGenerator[audio_pb2.EncodeResponse, None]:
        opened: audio_pb2.OpenEncode = await opening(requests)
        if (opened.encoding, opened.rate_hz, opened.num_channels) != ("pcm16", content.RATE_HZ, 1):
            raise ValueError(f"sound must be pcm16 at {content.RATE_HZ} Hz, one channel")
        with self._stage.admission.admit(opened.session_id, is_live=opened.is_live):
            history_s = self._stage.history_blocks * BLOCK_S
            yield audio_pb2.EncodeResponse(opened=audio_pb2.EncodeOpened(history_s=history_s))
            usage, num_blocks = StreamUsage(), 0
            answers = flatten(
                self._stage.stream(
                    Hearing(self._stage.step, opened), _until_the_end(requests), usage, is_live=opened.is_live
                )
            )
            async with aclosing(answers) as blocks:
                async for block in blocks:
                    num_blocks += 1
                    yield audio_pb2.EncodeResponse(block=block)
            yield audio_pb2.EncodeResponse(closed=types_pb2.Closed(num_blocks=num_blocks, busy_s=usage.busy_s))


async def _until_the_end(
    requests: AsyncIterator[audio_pb2.EncodeRequest],
) -> AsyncGenerator[audio_pb2.AudioPiece | None, None]:
    async with aclosing(parts(requests, "piece")) as pieces:
        async for piece in pieces:
            yield piece
    yield None


class DenoiserServicer(denoiser_pb2_grpc.DenoiserServiceServicer):
    """One level."""

    service_name = "avatar.worker.v1.DenoiserService"

    def __init__(self, stage: Stage, level: int) -> None:
        self._stage = stage
        self._level = level

    def add_to(self, server: grpc.aio.Server) -> None:
        denoiser_pb2_grpc.add_DenoiserServiceServicer_to_server(self, server)

    async def GetInfo(
        self, request: denoiser_pb2.DenoiserServiceGetInfoRequest, context: Context
    ) -> denoiser_pb2.DenoiserServiceGetInfoResponse:
        return denoiser_pb2.DenoiserServiceGetInfoResponse(
            levels=[self._level],
            num_levels=content.NUM_LEVELS,
            digest=DIGEST,
            capacity=self._stage.admission.capacity,
            active=self._stage.admission.active,
            step_s=self._stage.admission.step_times.p90_s,
        )

    async def Denoise(
        self, requests: AsyncIterator[denoiser_pb2.DenoiseRequest], context: Context
    ) -> AsyncGenerator[denoiser_pb2.DenoiseResponse, None]:
        opened: denoiser_pb2.OpenDenoise = await opening(requests)
        if opened.level != self._level:
            raise ValueError(f"level {opened.level} is not served here, only {self._level}")
        with self._stage.admission.admit(opened.session_id, is_live=opened.is_live):
            yield denoiser_pb2.DenoiseResponse(
                opened=denoiser_pb2.DenoiseOpened(
                    history_blocks=self._stage.history_blocks, num_levels=content.NUM_LEVELS, digest=DIGEST
                )
            )
            usage, num_blocks = StreamUsage(), 0
            level = Level(self._stage.step, opened.first_block, self._level)
            async with aclosing(
                self._stage.stream(level, parts(requests, "block"), usage, is_live=opened.is_live)
            ) as blocks:
                async for block in blocks:
                    num_blocks += 1
                    yield denoiser_pb2.DenoiseResponse(block=block)
            yield denoiser_pb2.DenoiseResponse(closed=types_pb2.Closed(num_blocks=num_blocks, busy_s=usage.busy_s))


class VaeServicer(vae_pb2_grpc.VaeServiceServicer):
    """One fragment a block; takes any picture for a reference."""

    service_name = "avatar.worker.v1.VaeService"

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def add_to(self, server: grpc.aio.Server) -> None:
        vae_pb2_grpc.add_VaeServiceServicer_to_server(self, server)

    async def GetInfo(
        self, request: vae_pb2.VaeServiceGetInfoRequest, context: Context
    ) -> vae_pb2.VaeServiceGetInfoResponse:
        return vae_pb2.VaeServiceGetInfoResponse(
            digest=DIGEST,
            width=SIDE,
            height=SIDE,
            fit="cover",
            frame_rate_hz=content.FRAME_RATE_HZ,
            block_frames=BLOCK_FRAMES,
            capacity=self._stage.admission.capacity,
            active=self._stage.admission.active,
            encodings=["fmp4"],
            step_s=self._stage.admission.step_times.p90_s,
        )

    async def EncodeReference(
        self, request: vae_pb2.EncodeReferenceRequest, context: Context
    ) -> vae_pb2.EncodeReferenceResponse:
        latent = types_pb2.Tensor(dtype="uint8", shape=[1, 1, 1, 1], data=b"\0")
        return vae_pb2.EncodeReferenceResponse(
            reference=types_pb2.Reference(
                id="0" * 64,
                width=SIDE,
                height=SIDE,
                fit="cover",
                motion=latent,
                sink=latent,
                frame_rate_hz=content.FRAME_RATE_HZ,
                block_frames=BLOCK_FRAMES,
            )
        )

    async def Decode(
        self, requests: AsyncIterator[vae_pb2.DecodeRequest], context: Context
    ) -> AsyncGenerator[vae_pb2.DecodeResponse, None]:
        opened: vae_pb2.OpenDecode = await opening(requests)
        with self._stage.admission.admit(opened.session_id, is_live=opened.is_live):
            yield vae_pb2.DecodeResponse(
                opened=vae_pb2.DecodeOpened(history_blocks=self._stage.history_blocks, init_segment=b"init")
            )
            usage, num_blocks = StreamUsage(), 0
            decoding = Decoding(self._stage.step, opened.first_block)
            async with aclosing(
                self._stage.stream(decoding, parts(requests, "block"), usage, is_live=opened.is_live)
            ) as frames:
                async for frame in frames:
                    num_blocks += 1
                    yield vae_pb2.DecodeResponse(frame=frame)
            yield vae_pb2.DecodeResponse(closed=types_pb2.Closed(num_blocks=num_blocks, busy_s=usage.busy_s))
