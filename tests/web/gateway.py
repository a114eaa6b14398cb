"""A stand-in of a gateway's live mode, over the real contract: the portrait nods while it hears, and idles when not.

It paces itself in blocks, gives sound back, and answers interrupts, as protos/avatar/v1 says. It draws nothing.
"""

import asyncio
import io
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc.aio
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from avatar.aio import background
from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import avatar_service_pb2_grpc as pb_grpc
from avatar.v1 import types_pb2 as types

FRAME_RATE_HZ = 25
BLOCK_FRAMES = 12
REACTION_S = 0.62
VIDEO = types.VideoFormat(width=128, height=128, frame_rate_hz=FRAME_RATE_HZ)


class StandIn(pb_grpc.AvatarServiceServicer):
    """One that answers.

    received: the sound of all streams. num_interrupts, num_turns: the interrupts and ends of turns. open: the streams
    that are open. failure: what CreateReference ends with.
    """

    def __init__(self, live_ahead_s: float) -> None:
        self._live_ahead_s = live_ahead_s
        self.received = bytearray()
        self.num_interrupts = self.num_turns = self.num_open = 0
        self.pictures: list[bytes] = []
        self.failure = ""
        self._faces: dict[str, NDArray[np.uint8]] = {}
        self._calls: set[Any] = set()

    def hang_up(self) -> None:
        """End every stream with an error."""
        for call in self._calls:
            call.has_hung_up = True

    async def GetCapabilities(self, request: Any, context: Any) -> pb.GetCapabilitiesResponse:
        return pb.GetCapabilitiesResponse(
            video=VIDEO,
            max_picture_bytes=2 << 20,
            max_audio_bytes=1 << 20,
            block_frames=BLOCK_FRAMES,
            num_levels=4,
            reaction_s=REACTION_S,
            max_live_ahead_s=self._live_ahead_s,
            max_unread_s=10,
        )

    async def CreateReference(self, request: pb.CreateReferenceRequest, context: Any) -> pb.CreateReferenceResponse:
        if self.failure:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, self.failure)
        self.pictures.append(request.picture)
        image = Image.open(io.BytesIO(request.picture)).convert("RGB").resize((VIDEO.width, VIDEO.height))
        name = f"{len(self._faces):064x}"
        self._faces[name] = np.array(image)
        return pb.CreateReferenceResponse(reference=types.Reference(id=name, width=VIDEO.width, height=VIDEO.height))

    async def CreateSession(self, request: pb.CreateSessionRequest, context: Any) -> pb.CreateSessionResponse:
        return pb.CreateSessionResponse(session=types.Session(id=request.reference_id, video=VIDEO, next_frame=3))

    async def DeleteSession(self, request: Any, context: Any) -> pb.DeleteSessionResponse:
        return pb.DeleteSessionResponse()

    async def StreamAvatar(
        self, requests: AsyncIterator[pb.StreamAvatarRequest], context: Any
    ) -> AsyncGenerator[pb.StreamAvatarResponse, None]:
        opening = (await anext(requests)).open
        assert opening.mode == pb.OpenAvatar.MODE_LIVE
        assert opening.return_audio
        session = types.Session(id=opening.session_id, video=VIDEO, next_frame=3)
        stream = Talk(self, self._faces[opening.session_id], opening.audio.rate_hz)
        self._calls.add(stream)
        self.num_open += 1
        try:
            yield pb.StreamAvatarResponse(opened=pb.AvatarOpened(session=session))
            async with background(stream.listen(requests)), aclosing(stream.show()) as responses:
                async for response in responses:
                    if stream.has_hung_up:
                        await context.abort(grpc.StatusCode.NOT_FOUND, "the session was deleted")
                    yield response
        finally:
            self._calls.discard(stream)
            self.num_open -= 1


class Talk:
    """One stream."""

    def __init__(self, owner: StandIn, face: NDArray[np.uint8], rate_hz: int) -> None:
        self.has_hung_up = False
        self._owner, self._face = owner, face
        self._frame_bytes = rate_hz // FRAME_RATE_HZ * 2
        self._sound = bytearray()
        self._answers: asyncio.Queue[pb.StreamAvatarResponse] = asyncio.Queue()
        self._next_frame, self._next_event, self._turn, self._position = 3, 0, 0, 0
        self._is_speaking = self._is_ending = self._is_closed = False

    async def listen(self, requests: AsyncIterator[pb.StreamAvatarRequest]) -> None:
        """Take what the client sends."""
        async for request in requests:
            match request.WhichOneof("part"):
                case "audio":
                    self._sound += request.audio.data
                    self._owner.received += request.audio.data
                case "end_turn":
                    self._owner.num_turns += 1
                    self._is_ending = True
                case "interrupt":
                    self._interrupt()
                case "close":
                    break
        self._is_closed = True

    async def show(self) -> AsyncGenerator[pb.StreamAvatarResponse, None]:
        """A block every 480 ms, and what is told between."""
        starts = time.monotonic()
        while not self._is_closed:
            for response in self._block():
                yield response
            starts += BLOCK_FRAMES / FRAME_RATE_HZ
            while (left_s := starts - time.monotonic()) > 0:
                try:
                    async with asyncio.timeout(left_s):
                        yield await self._answers.get()
                except TimeoutError:
                    break
        yield pb.StreamAvatarResponse(closed=pb.AvatarClosed(num_frames=self._next_frame - 3))

    def _block(self) -> list[pb.StreamAvatarResponse]:
        size = BLOCK_FRAMES * self._frame_bytes
        is_idle = len(self._sound) < size and not (self._is_ending and self._sound)
        responses = []
        if is_idle and self._is_speaking:
            responses.append(self._finished(False))
        if not is_idle and not self._is_speaking:
            self._is_speaking, self._position = True, 0
            responses.append(self._event(playback_started=pb.PlaybackStarted(turn=self._turn)))
        data = bytes(size) if is_idle else bytes(self._sound[:size]).ljust(size, b"\0")
        if not is_idle:
            del self._sound[:size]
            self._position += size
        responses.append(pb.StreamAvatarResponse(audio=types.AvatarAudio(pts_us=self._next_frame * 40000, data=data)))
        for i in range(BLOCK_FRAMES):
            level = np.frombuffer(data, "<i2", self._frame_bytes // 2, i * self._frame_bytes).astype(float).std() / 3000
            responses.append(pb.StreamAvatarResponse(frame=self._draw(level, is_idle)))
        return responses

    def _draw(self, level: float, is_idle: bool) -> types.VideoFrame:
        sway = round(min(2.0, 2 * level) + np.sin(self._next_frame / 8))
        frame = types.VideoFrame(
            index=self._next_frame,
            pts_us=self._next_frame * 40000,
            data=np.roll(self._face, sway, 0).tobytes(),
            is_idle=is_idle,
            is_key=True,
            num_frames=1,
        )
        self._next_frame += 1
        return frame

    def _interrupt(self) -> None:
        self._owner.num_interrupts += 1
        self._sound.clear()
        position_us = self._position * 20_000 // (self._frame_bytes // 2)
        was_speaking = self._is_speaking
        if was_speaking:
            self._answers.put_nowait(self._finished(True))
        answer = pb.AvatarInterrupted(
            next_frame=self._next_frame, position_us=position_us if was_speaking else 0, was_speaking=was_speaking
        )
        self._answers.put_nowait(pb.StreamAvatarResponse(interrupted=answer))

    def _finished(self, interrupted: bool) -> pb.StreamAvatarResponse:
        position_us = self._position * 20_000 // (self._frame_bytes // 2)
        end = pb.PlaybackFinished(
            turn=self._turn, position_us=position_us, interrupted=interrupted, next_frame=self._next_frame
        )
        self._turn += 1
        self._is_speaking = self._is_ending = False
        return self._event(playback_finished=end)

    def _event(self, **kind: Any) -> pb.StreamAvatarResponse:
        event = pb.AvatarEvent(number=self._next_event, pts_us=self._next_frame * 40000, **kind)
        self._next_event += 1
        return pb.StreamAvatarResponse(event=event)


@asynccontextmanager
async def standing_in(live_ahead_s: float) -> AsyncGenerator[tuple[str, StandIn], None]:
    """A stand-in that serves while the body runs, and its HOST:PORT."""
    server = grpc.aio.server()
    stand_in = StandIn(live_ahead_s)  # type: ignore[abstract]  # what the page does not call is not there
    pb_grpc.add_AvatarServiceServicer_to_server(stand_in, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}", stand_in
    finally:
        await server.stop(0)
