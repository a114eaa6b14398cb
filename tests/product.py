"""A minimal client for tests, over the public contract alone."""

import asyncio
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, TypeAlias

import grpc
import grpc.aio

from avatar.aio import background
from avatar.rpc.status import CallStatus
from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import avatar_service_pb2_grpc as pb_grpc
from avatar.v1 import types_pb2 as types

PIECE_BYTES = 1280  # 40 ms of PCM16 at 16 kHz
Stub: TypeAlias = "pb_grpc.AvatarServiceAsyncStub"
Call: TypeAlias = "grpc.aio.StreamStreamCall[pb.StreamAvatarRequest, pb.StreamAvatarResponse]"
PCM16 = types.AudioFormat(encoding=types.SAMPLE_ENCODING_PCM16, rate_hz=16000, num_channels=1)


@asynccontextmanager
async def connected(target: str, credentials: grpc.ChannelCredentials | None = None) -> AsyncGenerator[Stub, None]:
    """Connect a stub to the gateway at HOST:PORT, in plain text without credentials."""
    options = [("grpc.max_receive_message_length", 16 << 20), ("grpc.max_send_message_length", 64 << 20)]
    async with (
        grpc.aio.secure_channel(target, credentials, options=options)
        if credentials
        else grpc.aio.insecure_channel(target, options=options)
    ) as channel:
        yield pb_grpc.AvatarServiceStub(channel)


async def new_reference(stub: Stub, picture: bytes, **fields: Any) -> types.Reference:
    """Create a reference of a picture. fields: of CreateReferenceRequest."""
    return (await stub.CreateReference(pb.CreateReferenceRequest(picture=picture, **fields), timeout=60)).reference


async def new_session(stub: Stub, picture: bytes, **fields: Any) -> types.Session:
    """Create a session of a picture. fields: of CreateSessionRequest."""
    reference = await new_reference(stub, picture)
    request = pb.CreateSessionRequest(reference_id=reference.id, **fields)
    return (await stub.CreateSession(request, timeout=10)).session


@dataclass
class Streamed:
    """The output of a stream."""

    frames: list[types.VideoFrame] = field(default_factory=list)
    interrupted: list[pb.AvatarInterrupted] = field(default_factory=list)
    events: list[pb.AvatarEvent] = field(default_factory=list)
    audio: list[types.AvatarAudio] = field(default_factory=list)
    closed: pb.AvatarClosed = field(default_factory=pb.AvatarClosed)

    @property
    def pixels(self) -> list[bytes]:
        return [frame.data for frame in self.frames]

    @property
    def indexes(self) -> list[int]:
        return [frame.index for frame in self.frames]

    def add(self, response: pb.StreamAvatarResponse) -> None:
        """Record a message."""
        match response.WhichOneof("part"):
            case "frame":
                self.frames.append(response.frame)
            case "chunk":
                self.frames += response.chunk.frames
            case "interrupted":
                self.interrupted.append(response.interrupted)
            case "event":
                self.events.append(response.event)
            case "audio":
                self.audio.append(response.audio)
            case "closed":
                self.closed = response.closed


def opening(session_id: str, audio: types.AudioFormat = PCM16, **fields: Any) -> pb.StreamAvatarRequest:
    return pb.StreamAvatarRequest(open=pb.OpenAvatar(session_id=session_id, audio=audio, **fields))


def pieces(data: bytes, piece_bytes: int = PIECE_BYTES) -> Iterable[pb.StreamAvatarRequest]:
    """Yield audio in pieces."""
    for start in range(0, len(data), piece_bytes):
        yield pb.StreamAvatarRequest(audio=pb.AudioPiece(data=data[start : start + piece_bytes]))


def listening(data: bytes, heard: bytes) -> Iterable[pb.StreamAvatarRequest]:
    """Yield audio in pieces, each behind the other person's audio of the same time."""
    for own, other in zip_longest(pieces(data), pieces(heard)):
        if other:
            yield pb.StreamAvatarRequest(listen=pb.HeardAudio(data=other.audio.data))
        if own:
            yield own


def say(text: str, **fields: Any) -> pb.StreamAvatarRequest:
    """Text to speak. fields: of SayText."""
    return pb.StreamAvatarRequest(say=pb.SayText(text=text, **fields))


CLOSE = pb.StreamAvatarRequest(close=pb.CloseAvatar())
END_TURN = pb.StreamAvatarRequest(end_turn=pb.EndTurn())
INTERRUPT = pb.StreamAvatarRequest(interrupt=pb.InterruptAvatar())


async def stream(stub: Stub, requests: Iterable[pb.StreamAvatarRequest], timeout_s: float = 60) -> Streamed:
    """Open with the first request, send the others, and read to the end. Raises AioRpcError if it ends in one."""
    call = stub.StreamAvatar(timeout=timeout_s)
    status = CallStatus(call)
    first, *others = requests
    try:
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # reading raises the call's status
            await call.write(first)
        await answer(call)  # audio may be sent once the stream is open
        async with background(_send_all(call, others)):
            return await finish(call, ())
    except grpc.aio.AioRpcError as error:
        raise await status.instead_of(error) from None


async def _send_all(call: Call, requests: Iterable[pb.StreamAvatarRequest]) -> None:
    await send(call, requests)
    await call.done_writing()


async def speak(stub: Stub, session_id: str, data: bytes) -> Streamed:
    """Run a whole stream: open, audio, close."""
    return await stream(stub, [opening(session_id), *pieces(data), CLOSE])


async def open_stream(stub: Stub, session_id: str, **fields: Any) -> tuple[Call, pb.AvatarOpened]:
    """Open a stream; return the call and its first message. fields: of OpenAvatar."""
    call = stub.StreamAvatar(timeout=60)
    await call.write(opening(session_id, **fields))
    return call, (await answer(call)).opened


async def send(call: Call, requests: Iterable[pb.StreamAvatarRequest]) -> None:
    for request in requests:
        await call.write(request)


async def read_frames(call: Call, streamed: Streamed, num_frames: int) -> None:
    """Record a call's messages until there are so many frames."""
    while len(streamed.frames) < num_frames:
        streamed.add(await answer(call))


async def finish(
    call: Call, requests: Iterable[pb.StreamAvatarRequest] = (CLOSE,), streamed: Streamed | None = None
) -> Streamed:
    """Send the requests, and record all messages until the end. Raises AioRpcError if it is an error."""
    streamed = streamed or Streamed()
    await send(call, requests)
    for response in await rest(call):
        streamed.add(response)
    return streamed


async def answer(call: Call) -> pb.StreamAvatarResponse:
    """Return the next message of a call. Raises AioRpcError if it ends in an error."""
    response = await anext(aiter(call), None)
    assert isinstance(response, pb.StreamAvatarResponse), "the stream has ended"
    return response


async def frame(call: Call) -> types.VideoFrame:
    """Return the next frame of a call, skipping other messages."""
    while not (response := await answer(call)).HasField("frame"):
        pass
    return response.frame


async def rest(call: Call) -> list[pb.StreamAvatarResponse]:
    """Return all remaining messages of a call. Raises AioRpcError if it ends in an error."""
    return [response async for response in call]
