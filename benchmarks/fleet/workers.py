"""Stand-in workers of all stages in one process: `python -m benchmarks.fleet.workers SIZES TARGET ...`.

They speak the real worker contract, compute nothing, and answer every block at once with messages of the given sizes.
SIZES: the fields of `Sizes`, as JSON. TARGETS: HOST:PORT of each stage of `STAGES`, in order.
"""

import asyncio
import json
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack
from itertools import groupby
from typing import Any

import grpc.aio

from avatar.rpc.interceptor import parts, receive_open
from avatar.rpc.server import Servicer, serving, until_stopped
from avatar.worker.v1 import (
    audio_pb2,
    audio_pb2_grpc,
    denoiser_pb2,
    denoiser_pb2_grpc,
    types_pb2,
    vae_pb2,
    vae_pb2_grpc,
)
from benchmarks.fleet.content import DIGEST, FIRST_FRAME, LATENT_FRAMES, NUM_LEVELS, STAGES, Sizes, info_of


class AudioServicer(audio_pb2_grpc.AudioServiceServicer):
    """Answers each piece that completes a block with features. Live streams only."""

    service_name = "avatar.worker.v1.AudioService"

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        self._features = types_pb2.Tensor(dtype="bfloat16", shape=[1], data=bytes(sizes.features_bytes))
        self._active = 0

    def add_to(self, server: grpc.aio.Server) -> None:
        audio_pb2_grpc.add_AudioServiceServicer_to_server(self, server)

    async def GetInfo(self, request: Any, context: Any) -> Any:
        return info_of("audio", self._sizes, self._active)

    async def Encode(self, requests: AsyncIterator[Any], context: Any) -> AsyncGenerator[Any, None]:
        opened = await receive_open(requests)
        self._active += 1
        try:
            yield audio_pb2.EncodeResponse(opened=audio_pb2.EncodeOpened(history_s=self._sizes.block_s))
            num_blocks = opened.first_block
            async for piece in parts(requests, "piece"):
                num_blocks += 1
                block = types_pb2.Block(index=piece.completes, features=self._features, statistics=bytes(8))
                yield audio_pb2.EncodeResponse(block=block)
            yield audio_pb2.EncodeResponse(closed=types_pb2.Closed(num_blocks=num_blocks))
        finally:
            self._active -= 1


class DenoiserServicer(denoiser_pb2_grpc.DenoiserServiceServicer):
    """Answers each block of one level with a latent."""

    service_name = "avatar.worker.v1.DenoiserService"

    def __init__(self, sizes: Sizes, stage: str) -> None:
        self._sizes, self._stage = sizes, stage
        self._latent = types_pb2.Tensor(dtype="bfloat16", shape=[1], data=bytes(sizes.latent_bytes))
        self._active = 0

    def add_to(self, server: grpc.aio.Server) -> None:
        denoiser_pb2_grpc.add_DenoiserServiceServicer_to_server(self, server)

    async def GetInfo(self, request: Any, context: Any) -> Any:
        return info_of(self._stage, self._sizes, self._active)

    async def Denoise(self, requests: AsyncIterator[Any], context: Any) -> AsyncGenerator[Any, None]:
        await receive_open(requests)
        self._active += 1
        try:
            opened = denoiser_pb2.DenoiseOpened(history_blocks=1, num_levels=NUM_LEVELS, digest=DIGEST)
            yield denoiser_pb2.DenoiseResponse(opened=opened)
            async for block in parts(requests, "block"):
                answer = types_pb2.Block(index=block.index, latent=self._latent)
                yield denoiser_pb2.DenoiseResponse(block=answer)
            yield denoiser_pb2.DenoiseResponse(closed=types_pb2.Closed())
        finally:
            self._active -= 1


class VaeServicer(vae_pb2_grpc.VaeServiceServicer):
    """Answers each block with its frames. Accepts any picture as a reference."""

    service_name = "avatar.worker.v1.VaeService"

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        self._frame = bytes(sizes.frame_bytes)
        self._active = 0

    def add_to(self, server: grpc.aio.Server) -> None:
        vae_pb2_grpc.add_VaeServiceServicer_to_server(self, server)

    async def GetInfo(self, request: Any, context: Any) -> Any:
        return info_of("vae", self._sizes, self._active)

    async def EncodeReference(self, request: Any, context: Any) -> Any:
        latent = types_pb2.Tensor(dtype="uint8", shape=[1, 1, 1, 1], data=b"\0")
        info = info_of("vae", self._sizes, 0)
        reference = types_pb2.Reference(
            id="0" * 64,
            width=info.width,
            height=info.height,
            fit=info.fit,
            motion=latent,
            sink=latent,
            frame_rate_hz=info.frame_rate_hz,
            block_frames=info.block_frames,
        )
        return vae_pb2.EncodeReferenceResponse(reference=reference)

    async def Decode(self, requests: AsyncIterator[Any], context: Any) -> AsyncGenerator[Any, None]:
        opened = await receive_open(requests)
        self._active += 1
        try:
            yield vae_pb2.DecodeResponse(opened=vae_pb2.DecodeOpened(history_blocks=1))
            async for block in parts(requests, "block"):
                frames = self._frames(block.index)
                if opened.takes_chunks:
                    latents = [[*each] for _, each in groupby(frames, lambda frame: frame.index // LATENT_FRAMES)]
                    for each in latents:
                        for frame in each[:-1]:
                            frame.is_followed = True
                    chunks = [types_pb2.FrameChunk(frames=each) for each in latents]
                    yield [vae_pb2.DecodeResponse(chunk=chunk) for chunk in chunks]
                else:
                    yield [vae_pb2.DecodeResponse(frame=frame) for frame in frames]
            yield vae_pb2.DecodeResponse(closed=types_pb2.Closed())
        finally:
            self._active -= 1

    def _frames(self, block: int) -> list[types_pb2.Frame]:
        first, end = max(FIRST_FRAME, block * self._sizes.block_frames), (block + 1) * self._sizes.block_frames
        return [
            types_pb2.Frame(block=block, index=index, is_last=index == end - 1, data=self._frame, num_frames=1)
            for index in range(first, end)
        ]


def servicer(stage: str, sizes: Sizes) -> Servicer:
    """Return the servicer of a stage's worker."""
    if stage == "audio":
        return AudioServicer(sizes)
    return VaeServicer(sizes) if stage == "vae" else DenoiserServicer(sizes, stage)


async def main() -> None:
    sizes = Sizes(**json.loads(sys.argv[1]))
    async with AsyncExitStack() as stack:
        for stage, target in zip(STAGES, sys.argv[2:], strict=True):
            await stack.enter_async_context(serving(target, servicer(stage, sizes)))
        await until_stopped()


if __name__ == "__main__":
    asyncio.run(main())
