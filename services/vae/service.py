"""The VAE worker's service: pictures to references, and blocks of latents to encoded frames.

    DecodeRequest (block) --> LatentFrame --device--> FrameChunk --encode--> DecodeResponse (frame)

The device decodes one latent frame at a time, and its frames leave before the next one is decoded; only H.264 waits for
the rest of the block, unless the stream is opened with `per_latent`.
"""

import asyncio
import hashlib
import math
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import Any, cast

import grpc.aio
import numpy as np

from avatar import telemetry
from avatar.errors import NoCapacity
from avatar.rpc.codec import block_from_wire, load_to_pb, session_from_open, tensor_to_pb
from avatar.rpc.interceptor import Context, as_invalid_field, max_active, parts, receive_open
from avatar.rpc.status import INPUT_TAKEN
from avatar.runtime.admission import AdmissionControl, StepTimes
from avatar.runtime.device_queue import DeviceQueue
from avatar.runtime.pipeline import Step, StreamUsage, local
from avatar.types import FrameChunk, LatentFrame
from avatar.vae import encodings
from avatar.vae.encodings import Encoded
from avatar.vae.marks.label import draw_label
from avatar.vae.marks.metadata import MARKS_OF
from avatar.vae.picture.reading import Picture
from avatar.vae.picture.rule import Fit
from avatar.vae.vae import Vae
from avatar.worker.v1 import vae_pb2 as pb
from avatar.worker.v1 import vae_pb2_grpc
from avatar.worker.v1.types_pb2 import Closed, Frame, Reference

# References that are prepared at a time: each waits in the queue of the streams' blocks.
MAX_REFERENCES = 2
# Frames that share a message: a message costs more than their bytes, but twelve of 0.9 MB pass faster than their sum.
MAX_CHUNK_BYTES = 1_000_000


class VaeServicer(vae_pb2_grpc.VaeServiceServicer):
    """Serves one VAE to as many sessions as it has capacity for."""

    service_name = "avatar.worker.v1.VaeService"
    stage = "vae"

    def __init__(self, vae: Vae[Any], digest: str, queue: DeviceQueue, capacity: int) -> None:
        """digest: of the checkpoint's VAE part. capacity: streams at a time."""
        self._vae = vae
        self._digest = digest
        self._queue = queue
        self._block_s = vae.block_frames / vae.config.frame_rate_hz
        telemetry.BLOCK_VIDEO.set(self._block_s)
        # A block is one step for admission, although it is decoded in several.
        self._admission = AdmissionControl(capacity, "vae", queue.load, self._block_s)
        self._latent_times = StepTimes(self._block_s / vae.block_latents)
        self._pixel_bytes = 0  # memory of a stream's state for each pixel of its latents
        self.changed = asyncio.Event()
        self._admission.on_change = self.changed.set
        self._preparing = asyncio.Semaphore(MAX_REFERENCES)
        # Threads that wait for the processes that decode pictures, so that neither the device nor the event loop does.
        self._picture_readers = ThreadPoolExecutor(MAX_REFERENCES, "picture")
        # Frames are encoded on a thread of their own, while the device decodes the next block.
        self._encoder = ThreadPoolExecutor(1, "encode")

    def add_to(self, server: grpc.aio.Server) -> None:
        vae_pb2_grpc.add_VaeServiceServicer_to_server(self, server)

    def warm(self) -> None:
        """Encode and decode blank pictures of every size that is served, and measure the duration of a step."""
        self._pixel_bytes, stride = self._vae.pixel_bytes(), self._vae.codec.space_stride
        for width, height in self._vae.config.picture.all_sizes:
            self._admission.add_size(self._pixel_bytes * (width // stride) * (height // stride))
            self._vae.warm_encoder(width, height)
            self._admission.measure(partial(self._vae.warm, width, height))
            self._latent_times.append(self._admission.step_times[-1] / self._vae.block_latents)

    def info(self) -> pb.VaeServiceGetInfoResponse:
        """Describe the worker as it is now."""
        rule = self._vae.config.picture
        width, height = rule.fixed_size or (0, 0)
        return pb.VaeServiceGetInfoResponse(
            digest=self._digest,
            width=width,
            height=height,
            sizes_free=rule.fixed_size is None,
            fit=rule.fit,
            frame_rate_hz=self._vae.config.frame_rate_hz,
            block_frames=self._vae.block_frames,
            capacity=self._admission.capacity,
            active=self._admission.active,
            max_streams=self._admission.limit,
            encodings=list(encodings.ENCODINGS),
            step_s=self._admission.step_times.p90_s,
            latent_step_s=self._latent_times.p90_s,
            load=load_to_pb(self._queue.load),
            labels=True,
            sizes=[pb.VideoSize(width=width, height=height) for width, height in rule.all_sizes],
        )

    async def GetInfo(self, request: pb.VaeServiceGetInfoRequest, context: Context) -> pb.VaeServiceGetInfoResponse:
        return self.info()

    async def EncodeReference(self, request: pb.EncodeReferenceRequest, context: Context) -> pb.EncodeReferenceResponse:
        if self._preparing.locked():
            raise NoCapacity(f"{MAX_REFERENCES} pictures are being prepared already", retry_s=1.0)
        async with self._preparing:
            await context.send_initial_metadata((INPUT_TAKEN,))
            loop = asyncio.get_running_loop()
            picture = await loop.run_in_executor(self._picture_readers, self._read_picture, request)
            # No deadline: below live blocks, but first come, first served with offline work, so it cannot starve.
            return await self._queue.run(self._encode_reference, request, picture)

    def _read_picture(self, request: pb.EncodeReferenceRequest) -> Picture:
        size = (request.width, request.height) if request.width or request.height else request.area or None
        if size is not None:
            with as_invalid_field("area" if isinstance(size, int) else "width"):
                self._vae.config.picture.check(size)
        fit = cast(Fit, request.fit or None)  # any other is refused with the picture
        try:
            with as_invalid_field("picture"):
                return self._vae.read_picture(request.picture, size, fit)
        except TimeoutError as error:
            raise NoCapacity(str(error), retry_s=1.0) from error

    def _encode_reference(self, request: pb.EncodeReferenceRequest, picture: Picture) -> pb.EncodeReferenceResponse:
        fit = request.fit or self._vae.config.picture.fit
        rgb = picture.rgb
        motion = self._vae.encode_picture(rgb)
        height, width, _ = rgb.shape
        name = hashlib.sha256(request.picture)
        name.update(f"/{width}x{height}/{fit}/{self._digest}".encode())
        return pb.EncodeReferenceResponse(
            reference=Reference(
                id=name.hexdigest(),
                width=width,
                height=height,
                fit=fit,
                motion=tensor_to_pb(motion),
                sink=tensor_to_pb(motion[:, :1]),
                frame_rate_hz=self._vae.config.frame_rate_hz,
                block_frames=self._vae.block_frames,
                notice=self._vae.notice(picture, motion),
                num_faces=picture.num_faces,
                face_share=picture.face_share,
            )
        )

    async def Decode(self, requests: AsyncIterator[pb.DecodeRequest], context: Context) -> AsyncGenerator[Any, None]:
        opened: pb.OpenDecode = await receive_open(requests)
        encoding, quality, rate_hz = opened.encoding or "rgb24", opened.quality, self._vae.config.frame_rate_hz
        with as_invalid_field("open.encoding"):
            encodings.check_encoding(encoding)
        with as_invalid_field("open.quality"):
            encodings.check_quality(quality)

        waits_for_block = encoding in encodings.GROUPED and not opened.per_latent
        is_marked, has_label = not opened.unmarked, opened.session.label
        marks = [*(MARKS_OF[encoding] if is_marked else ()), *(["label"] if has_label else [])]

        def encode(chunks: list[FrameChunk]) -> list[Frame]:
            pixels = np.concatenate([chunk.frames.numpy() for chunk in chunks])
            if has_label:
                draw_label(pixels)
            first = chunks[0].first_frame
            return _frames(chunks, encodings.encode(pixels, encoding, rate_hz, quality, first, is_marked=is_marked))

        with as_invalid_field("open.session"):
            session = session_from_open(opened)
        accepted = self._admission.admit(
            opened.session_id,
            is_live=opened.is_live,
            max_active=max_active(opened),
            claimed_us=opened.claimed_us,
            num_bytes=self._pixel_bytes * math.prod(session.motion.shape[2:]),
        )
        with await accepted as reservation, as_invalid_field("block"):
            width, height = opened.session.width, opened.session.height
            loop = asyncio.get_running_loop()
            init_segment = partial(encodings.init_segment, is_marked=is_marked)
            init = await loop.run_in_executor(self._encoder, init_segment, encoding, height, width, rate_hz, quality)
            history_blocks = self._vae.history_blocks
            yield pb.DecodeResponse(
                opened=pb.DecodeOpened(history_blocks=history_blocks, init_segment=init, marks=marks)
            )
            decoding_usage, encoding_usage = StreamUsage(self._latent_times), StreamUsage()
            decoding_steps: list[Step] = []  # of the present block
            encoding_steps: list[Step] = []
            num_blocks = 0
            live_block_s = self._block_s if opened.is_live else None
            stage = local(
                self._vae, session, self._queue, decoding_usage, live_block_s=live_block_s, reservation=reservation
            )
            del reservation  # the stage and the state keep it
            group: list[FrameChunk] = []
            async with aclosing(stage(self._latent_frames(opened, requests))) as chunks:
                async for chunk in chunks:
                    decoding_steps.append(decoding_usage.last_step)
                    group.append(chunk)
                    if waits_for_block and not chunk.is_last:
                        continue
                    frames = await loop.run_in_executor(self._encoder, encoding_usage.measure, encode, group)
                    encoding_steps.append(encoding_usage.last_step)
                    group = []
                    if chunk.is_last:
                        step = _joined(decoding_steps)
                        self._admission.step_times.append((step[1] - step[0]) / 1e9)
                        telemetry.block_span("vae", chunk.block, *step, parent=chunk.traceparent)
                        telemetry.block_span("encode", chunk.block, *_joined(encoding_steps), parent=chunk.traceparent)
                        decoding_steps, encoding_steps = [], []
                        num_blocks += 1
                    yield _responses(frames, takes_chunks=opened.takes_chunks)  # written one by one
            busy_s = decoding_usage.busy_s + encoding_usage.busy_s
            yield pb.DecodeResponse(closed=Closed(num_blocks=num_blocks, busy_s=busy_s))

    async def _latent_frames(
        self, opened: pb.OpenDecode, requests: AsyncIterator[pb.DecodeRequest]
    ) -> AsyncGenerator[LatentFrame, None]:
        """Yield the latent frames of the stream's blocks. ValueError if a block is missing."""
        expected = opened.first_block
        async with aclosing(parts(requests, "block")) as messages:
            async for message in messages:
                if message.index != expected:
                    raise ValueError(f"block {message.index} came, expected {expected}")
                expected += 1
                for latent in self._vae.latent_frames(block_from_wire(message, None)):
                    yield latent


def _joined(steps: list[Step]) -> Step:
    """Return the steps of a block as one: from the first one's start, as long as all of them."""
    start_ns = steps[0][0]
    duration_ns = sum(end_ns - start_ns for start_ns, end_ns, _ in steps)
    waits_s = [waited_s for _, _, waited_s in steps if waited_s is not None]
    return start_ns, start_ns + duration_ns, sum(waits_s) if waits_s else None


def _frames(chunks: list[FrameChunk], encoded: list[Encoded]) -> list[Frame]:
    """Return the chunks' frames or fragments as messages."""
    frames, block, index = [], chunks[0].block, chunks[0].first_frame
    for each in encoded:
        frame = Frame(block=block, index=index, data=each.data, is_key=each.is_key, num_frames=each.num_frames)
        frames.append(frame)
        index += each.num_frames
    frames[-1].is_last = chunks[-1].is_last
    return frames


def _responses(frames: list[Frame], *, takes_chunks: bool) -> list[pb.DecodeResponse]:
    """Return frames that are ready together in as few chunks as may be, or each in a message of its own."""
    if not takes_chunks:
        return [pb.DecodeResponse(frame=frame) for frame in frames]
    responses: list[pb.DecodeResponse] = []
    num_bytes = MAX_CHUNK_BYTES
    for frame in frames:
        num_bytes += frame.ByteSize()
        if num_bytes > MAX_CHUNK_BYTES:
            responses.append(pb.DecodeResponse())
            num_bytes = frame.ByteSize()
        else:
            responses[-1].chunk.frames[-1].is_followed = True
        responses[-1].chunk.frames.append(frame)
    return responses
