"""One session's stream: a client's sound in at one end of the pipeline, numbered frames out at the other.

    pieces -> audio -> admitted -> denoiser 0 .. N-1 -> finished -> vae -> frames

Blocks are admitted in order and numbered here, and always run through to the end. An interrupt drops what is not yet
admitted, and the frames of what is; it never reaches into the pipeline, whose states have no way back.
"""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from fractions import Fraction

from avatar import telemetry
from avatar.errors import ConnectionLost, InvalidAudio, MessageTooLarge, ProtocolOrder
from avatar.rpc.client import RemoteStage
from avatar.settings import GatewaySettings
from avatar.v1 import avatar_service_pb2 as api
from avatar.v1 import types_pb2 as api_types
from avatar.worker.v1 import audio_pb2, types_pb2
from services.gateway.workers import Streams

SAMPLE_BYTES = {"pcm16": 2, "float32": 4}
# A piece of a client may hold many seconds; the pipeline is given them in smaller ones.
PIECE_S = 0.1


class Conversation:
    """The pipeline of one stream.

    sound: format of the client's sound. position: where the session is; kept up to date.
    write: sends a message to the client.
    """

    def __init__(
        self,
        streams: Streams,
        sound: audio_pb2.OpenEncode,
        session: types_pb2.Session,
        position: types_pb2.Position,
        settings: GatewaySettings,
        write: Callable[[api.StreamAvatarResponse], Awaitable[None]],
    ) -> None:
        self.position = position
        self.num_frames = 0
        self.num_blocks = 0
        self.advanced = asyncio.Event()
        self._streams = streams
        self._settings = settings
        self._write = write
        self._writing = asyncio.Lock()
        self._frame_rate_hz = session.frame_rate_hz
        self._rate_hz = sound.rate_hz
        self._sample_bytes = SAMPLE_BYTES[sound.encoding] * sound.num_channels
        # Samples of one block's sound, as an exact fraction: 12 frames at 25 Hz are 12/25 s.
        self._block_samples = Fraction(session.block_frames * sound.rate_hz, session.frame_rate_hz)
        self._sent_samples = 0
        self._encoded_blocks = 0
        self._room = asyncio.Condition()
        # As many as there are stages behind admission keeps each busy; one more waits at the door.
        self._slots = asyncio.Semaphore(len(streams.denoisers) + 2)
        self._next_block = position.next_block
        self._is_sink_written = asyncio.Event()
        self._num_interrupts = 0
        self._drop_encoded = 0
        self._drop_blocks = position.next_block
        self._first_sound_s: float | None = None

    def interrupt(self) -> int:
        """Drop sound that is not yet admitted and frames that are not yet sent; the next frame's number."""
        self._num_interrupts += 1
        self._drop_encoded = math.ceil(self._sent_samples / self._block_samples)
        self._drop_blocks = self._next_block
        return self.position.next_frame

    async def run(self, requests: AsyncIterator[api.StreamAvatarRequest]) -> None:
        """Send frames as they are made, until the client has closed and all are sent."""
        blocks = self._admitted(self._streams.audio(self._pieces(requests)))
        for denoiser in self._streams.denoisers:
            blocks = _with_features(denoiser, blocks)
        async with aclosing(self._streams.vae(self._finished(blocks))) as frames:
            async for frame in frames:
                if frame.is_last:
                    self._slots.release()
                    self.num_blocks += 1
                    self.position.next_block = frame.block + 1
                    self.advanced.set()
                async with self._writing:
                    if frame.block >= self._drop_blocks:
                        await self._write(api.StreamAvatarResponse(frame=self._numbered(frame)))

    def usage(self) -> list[api_types.StageUsage]:
        """What each stage did, once all has been answered."""
        return [
            api_types.StageUsage(stage=each.stage, num_blocks=each.closed.num_blocks, busy_s=each.closed.busy_s)
            for each in self._streams.all
        ]

    def _numbered(self, frame: types_pb2.Frame) -> api_types.VideoFrame:
        if not self.num_frames and self._first_sound_s is not None:
            telemetry.TIME_TO_FIRST_FRAME.record(time.monotonic() - self._first_sound_s)
        index = self.position.next_frame
        self.position.next_frame += 1
        self.num_frames += 1
        return api_types.VideoFrame(index=index, pts_us=index * 1_000_000 // self._frame_rate_hz, data=frame.data)

    async def _pieces(
        self, requests: AsyncIterator[api.StreamAvatarRequest]
    ) -> AsyncGenerator[audio_pb2.AudioPiece, None]:
        """The client's sound, read no faster than blocks are admitted."""
        async for request in requests:
            if filling := self._to_block_end():
                yield self._sent(bytes(filling * self._sample_bytes))
            match request.WhichOneof("part"):
                case "audio":
                    self._first_sound_s = self._first_sound_s or time.monotonic()
                    interrupts = self._num_interrupts
                    for data in self._checked(request.audio.data):
                        await self._until_room()
                        if self._num_interrupts > interrupts:
                            break
                        yield self._sent(data)
                case "interrupt":
                    async with self._writing:
                        interrupted = api.AvatarInterrupted(next_frame=self.interrupt())
                        await self._write(api.StreamAvatarResponse(interrupted=interrupted))
                case "close":
                    if not self._sent_samples:
                        raise InvalidAudio.at("audio.data", "the stream was closed before any sound came")
                    return
                case part:
                    raise ProtocolOrder(f"{part or 'an empty message'} came on an open stream")
        raise ConnectionLost("the stream ended without close; what was in the pipeline is lost")

    def _checked(self, data: bytes) -> list[bytes]:
        """A piece as pieces of at most PIECE_S."""
        if len(data) > self._settings.max_audio_bytes:
            raise MessageTooLarge(f"{len(data)} bytes of sound at once, the limit is {self._settings.max_audio_bytes}")
        if len(data) % self._sample_bytes:
            raise InvalidAudio.at("audio.data", f"{len(data)} bytes are no multiple of {self._sample_bytes}")
        size = max(1, int(self._rate_hz * PIECE_S)) * self._sample_bytes
        return [data[i : i + size] for i in range(0, len(data), size)]

    def _sent(self, data: bytes) -> audio_pb2.AudioPiece:
        self._sent_samples += len(data) // self._sample_bytes
        return audio_pb2.AudioPiece(data=data)

    def _to_block_end(self) -> int:
        """Samples of silence that keep sound from before an interrupt out of the block of the sound after it."""
        return max(0, math.ceil(self._drop_encoded * self._block_samples) - self._sent_samples)

    async def _until_room(self) -> None:
        most = self._settings.audio_ahead_s * self._rate_hz
        async with self._room:
            await self._room.wait_for(lambda: self._sent_samples - self._encoded_blocks * self._block_samples < most)

    async def _admitted(self, encoded: AsyncGenerator[types_pb2.Block, None]) -> AsyncGenerator[types_pb2.Block, None]:
        """The blocks that are denoised, numbered, as many at a time as keep every stage busy."""
        async with aclosing(encoded):
            async for block in encoded:
                await self._slots.acquire()
                if self._next_block == self._streams.sink_update_block:
                    await self._is_sink_written.wait()
                self._encoded_blocks += 1
                async with self._room:
                    self._room.notify_all()
                if block.index < self._drop_encoded:
                    self._slots.release()
                    continue
                update = self._streams.sink_update_block
                block.conditions = int(update is not None and self._next_block >= update)
                block.index = self._next_block
                self._next_block += 1
                yield block

    async def _finished(self, blocks: AsyncGenerator[types_pb2.Block, None]) -> AsyncGenerator[types_pb2.Block, None]:
        """Denoised blocks for the decoder; once block 0 is here, the last level has written the new sink."""
        async with aclosing(blocks):
            async for block in blocks:
                self._is_sink_written.set()
                block.ClearField("features")
                yield block


async def _with_features(
    denoiser: RemoteStage[types_pb2.Block, types_pb2.Block], blocks: AsyncGenerator[types_pb2.Block, None]
) -> AsyncGenerator[types_pb2.Block, None]:
    """A level's answers, with what it was given put back: it answers with the latent alone."""
    given: dict[int, types_pb2.Block] = {}

    async def kept() -> AsyncGenerator[types_pb2.Block, None]:
        async with aclosing(blocks):
            async for block in blocks:
                given[block.index] = block
                yield block

    async with aclosing(denoiser(kept())) as answers:
        async for answer in answers:
            block = given.pop(answer.index)
            block.latent.CopyFrom(answer.latent)
            yield block
