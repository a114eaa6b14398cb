"""The audio worker's service: pieces of speech in, blocks of features out."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

import grpc.aio

from avatar import telemetry
from avatar.audio.model import AudioModel
from avatar.audio.resample import check_piece
from avatar.errors import InvalidAudio
from avatar.rpc.codec import audio_session_from_pb, block_to_wire, due_s, heard_from_pb, load_to_pb, piece_from_bytes
from avatar.rpc.interceptor import Context, as_invalid_field, max_active, parts, receive_open
from avatar.runtime.admission import AdmissionControl
from avatar.runtime.device_queue import DeviceQueue
from avatar.runtime.pipeline import StreamUsage, flatten, local
from avatar.types import AudioPiece
from avatar.worker.v1 import audio_pb2 as pb
from avatar.worker.v1 import audio_pb2_grpc
from avatar.worker.v1.types_pb2 import Closed


class AudioServicer(audio_pb2_grpc.AudioServiceServicer):
    """Serves one audio model to as many sessions as it has capacity for."""

    service_name = "avatar.worker.v1.AudioService"
    stage = "audio"

    def __init__(self, audio: AudioModel, encoder: str, digest: str, queue: DeviceQueue, capacity: int) -> None:
        """encoder: its name. digest: of the checkpoint's audio part. capacity: streams at a time."""
        self._audio = audio
        self._encoder = encoder
        self._digest = digest
        self._queue = queue
        self._admission = AdmissionControl(capacity, "audio", queue.load, audio.grid.duration_s)
        self.changed = asyncio.Event()
        self._admission.on_change = self.changed.set

    def add_to(self, server: grpc.aio.Server) -> None:
        audio_pb2_grpc.add_AudioServiceServicer_to_server(self, server)

    def warm(self, *, listens: bool) -> None:
        """Measure the duration of a step. listens: of streams that listen, which takes twice as long."""
        self._admission.measure(partial(self._audio.warm, listens=listens))

    def info(self) -> pb.AudioServiceGetInfoResponse:
        """Describe the worker as it is now."""
        return pb.AudioServiceGetInfoResponse(
            encoder=self._encoder,
            digest=self._digest,
            block_frames=self._audio.grid.frames,
            lookahead_s=self._audio.lookahead_s,
            capacity=self._admission.capacity,
            active=self._admission.active,
            max_streams=self._admission.limit,
            max_right_frames=self._audio.max_right_frames,
            step_s=self._admission.step_times.p90_s,
            load=load_to_pb(self._queue.load),
        )

    async def GetInfo(self, request: pb.AudioServiceGetInfoRequest, context: Context) -> pb.AudioServiceGetInfoResponse:
        return self.info()

    async def Encode(self, requests: AsyncIterator[pb.EncodeRequest], context: Context) -> AsyncGenerator[Any, None]:
        opened: pb.OpenEncode = await receive_open(requests)
        with as_invalid_field("open.audio", InvalidAudio):
            check_piece(piece_from_bytes(b"", opened.encoding, opened.rate_hz, opened.num_channels))
        accepted = self._admission.admit(
            opened.session_id,
            is_live=opened.is_live,
            max_active=max_active(opened),
            claimed_us=opened.claimed_us,
        )
        with await accepted, as_invalid_field("audio.data", InvalidAudio):
            yield pb.EncodeResponse(opened=pb.EncodeOpened(history_s=self._audio.history_s))
            usage, num_blocks = StreamUsage(self._admission.step_times), 0
            session = audio_session_from_pb(opened)
            start = opened.first_block, opened.first_answer, opened.statistics, opened.inputs
            live_block_s = self._audio.grid.duration_s if opened.is_live else None
            resume = partial(self._audio.resume, session, *start)
            stage = local(self._audio, session, self._queue, usage, live_block_s=live_block_s, take_state=resume)
            async with aclosing(flatten(stage(_pieces(opened, requests)))) as blocks:
                async for block in blocks:
                    span = telemetry.block_span("audio", block.index, *usage.last_step, link=opened.traceparent)
                    num_blocks += 1
                    yield block_to_wire(replace(block, traceparent=span))
            yield pb.EncodeResponse(closed=Closed(num_blocks=num_blocks, busy_s=usage.busy_s))


async def _pieces(opened: pb.OpenEncode, requests: AsyncIterator[pb.EncodeRequest]) -> AsyncGenerator[AudioPiece, None]:
    """Yield the stream's pieces, and the end of its audio after the last one."""
    audio_format = opened.encoding, opened.rate_hz, opened.num_channels
    async with aclosing(parts(requests, "piece")) as messages:
        async for message in messages:
            piece = piece_from_bytes(message.data, *audio_format)
            if message.heard:
                with as_invalid_field("listen.data", InvalidAudio):
                    heard = [heard_from_pb(each) for each in message.heard]
                    for each in heard:
                        check_piece(AudioPiece(each.samples, each.rate_hz))
                piece = replace(piece, heard=heard)
            if message.HasField("completes"):
                behind = piece_from_bytes(message.behind, *audio_format).samples
                piece = replace(piece, completes=message.completes, behind=behind, due_s=due_s(message))
            yield piece
    yield replace(piece_from_bytes(b"", *audio_format), is_last=True)
