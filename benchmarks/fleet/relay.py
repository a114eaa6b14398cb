"""The floor of a gateway's cost: bare grpc.aio that relays the same messages, `python -m benchmarks.fleet.relay`.

    python -m benchmarks.fleet.relay LISTEN SIZES TARGET ...

For every block of a client's audio it sends each stage a message of the real size and reads the stage's answers, then
sends the client the frames in as many messages as the gateway does. It parses and keeps nothing, and has neither
deadlines, nor a store, nor failover.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
import grpc.aio

from avatar.rpc.channel import OPTIONS, channel
from avatar.rpc.server import until_stopped
from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import types_pb2 as types
from avatar.worker.v1 import audio_pb2, denoiser_pb2, types_pb2, vae_pb2
from benchmarks.fleet.clients import PIECES
from benchmarks.fleet.content import LATENT_FRAMES, STAGES, Sizes

SERVICE = "avatar.v1.AvatarService"
PACKAGE = "avatar.worker.v1"
# Of each stage: its method, and the message that opens a stream.
CALLS: dict[str, tuple[str, Any]] = {
    "audio": ("AudioService/Encode", audio_pb2.EncodeRequest(open=audio_pb2.OpenEncode())),
    "denoiser": ("DenoiserService/Denoise", denoiser_pb2.DenoiseRequest(open=denoiser_pb2.OpenDenoise())),
    "vae": ("VaeService/Decode", vae_pb2.DecodeRequest(open=vae_pb2.OpenDecode(takes_chunks=True))),
}


class Relay:
    """Streams of clients over bare streams at the workers. All bytes are made once, so blocks have wrong numbers."""

    def __init__(self, sizes: Sizes, channels: dict[str, grpc.aio.Channel]) -> None:
        self._channels, self._sizes = channels, sizes
        features = types_pb2.Tensor(dtype="bfloat16", shape=[1], data=bytes(sizes.features_bytes))
        latent = types_pb2.Tensor(dtype="bfloat16", shape=[1], data=bytes(sizes.latent_bytes))
        piece = audio_pb2.AudioPiece(data=bytes(sizes.block_bytes), completes=1)
        block = types_pb2.Block(index=1, features=features, latent=latent)
        clean = types_pb2.Block(index=1, latent=latent)
        denoise = denoiser_pb2.DenoiseRequest(block=block).SerializeToString()
        self._requests = dict.fromkeys(STAGES, denoise)
        self._requests["audio"] = audio_pb2.EncodeRequest(piece=piece).SerializeToString()
        self._requests["vae"] = vae_pb2.DecodeRequest(block=clean).SerializeToString()
        frame = types.VideoFrame(index=1, data=bytes(sizes.frame_bytes))
        self._frame = pb.StreamAvatarResponse(frame=frame).SerializeToString()
        chunk = types.VideoChunk(frames=[frame] * LATENT_FRAMES)
        self._chunk = pb.StreamAvatarResponse(chunk=chunk).SerializeToString()

    async def create_reference(self, request: bytes, context: Any) -> bytes:
        return pb.CreateReferenceResponse(reference=types.Reference(id="0")).SerializeToString()

    async def create_session(self, request: bytes, context: Any) -> bytes:
        return pb.CreateSessionResponse(session=types.Session(id="0")).SerializeToString()

    async def stream(self, requests: AsyncIterator[bytes], context: Any) -> None:
        opening = pb.StreamAvatarRequest.FromString(await anext(aiter(requests)))
        takes_chunks = opening.open.output.takes_chunks
        calls = {stage: await self._open(stage) for stage in STAGES}
        await context.write(pb.StreamAvatarResponse(opened=pb.AvatarOpened()).SerializeToString())
        num_pieces = 0
        async for request in requests:
            if len(request) < self._sizes.block_bytes // PIECES:  # `close`
                break
            num_pieces += 1
            if num_pieces % PIECES == 0:
                await self._make_block(calls, context, takes_chunks=takes_chunks)
        for call in calls.values():
            call.cancel()

    async def _open(self, stage: str) -> Any:
        method, opening = CALLS[stage.partition("-")[0]]
        open_call: Any = self._channels[stage].stream_stream(f"/{PACKAGE}.{method}")
        call: Any = open_call()
        await call.write(opening.SerializeToString())
        await call.read()
        return call

    async def _make_block(self, calls: dict[str, Any], context: Any, *, takes_chunks: bool) -> None:
        for stage in STAGES:
            await calls[stage].write(self._requests[stage])
            for _ in range(self._sizes.block_frames // LATENT_FRAMES if stage == "vae" else 1):
                await calls[stage].read()
        size, message = (LATENT_FRAMES, self._chunk) if takes_chunks else (1, self._frame)
        for _ in range(self._sizes.block_frames // size):
            await context.write(message)


async def main() -> None:
    sizes = Sizes(**json.loads(sys.argv[2]))
    async with AsyncExitStack() as stack:
        channels = {
            stage: await stack.enter_async_context(channel(target))
            for stage, target in zip(STAGES, sys.argv[3:], strict=True)
        }
        relay = Relay(sizes, channels)
        server = grpc.aio.server(options=OPTIONS)
        handlers: dict[str, Any] = {
            "CreateReference": grpc.unary_unary_rpc_method_handler(relay.create_reference),
            "CreateSession": grpc.unary_unary_rpc_method_handler(relay.create_session),
            "StreamAvatar": grpc.stream_stream_rpc_method_handler(relay.stream),
        }
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
        server.add_insecure_port(sys.argv[1])
        await server.start()
        await until_stopped()
        await server.stop(0)


if __name__ == "__main__":
    asyncio.run(main())
