"""A connection to a gateway, and the sessions made over it."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import asynccontextmanager, suppress
from ipaddress import ip_address
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import grpc
import grpc.aio

from avatar.aio import background
from avatar.client.items import Interrupted, interrupted_of
from avatar.client.stream import Sound, Stream
from avatar.errors import AvatarError
from avatar.rpc.status import error_of
from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import avatar_service_pb2_grpc as pb_grpc
from avatar.v1 import types_pb2 as types

if TYPE_CHECKING:
    from avatar.v1.avatar_service_pb2_grpc import AvatarServiceAsyncStub

Answer = TypeVar("Answer")
Encoding = Literal["pcm16", "float32"]
Video = Literal["rgb24", "jpeg", "h264", "fmp4"]

CALL_S = 30.0
# A picture goes through the codec, behind the blocks of others.
CREATE_S = 90.0
GIVE_UP_S = 2.0
MAX_MESSAGE_BYTES = 64 << 20
OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A connection that is cut without a word is noticed after 13 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
    # A stream is resumed within seconds or not at all: do not wait longer between attempts to connect.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]
ENCODINGS = {"pcm16": types.SAMPLE_ENCODING_PCM16, "float32": types.SAMPLE_ENCODING_FLOAT32}
VIDEOS = {
    "rgb24": types.VIDEO_ENCODING_RGB24,
    "jpeg": types.VIDEO_ENCODING_JPEG,
    "h264": types.VIDEO_ENCODING_H264,
    "fmp4": types.VIDEO_ENCODING_FMP4,
}
FITS = {"": types.FIT_UNSPECIFIED, "cover": types.FIT_COVER, "reference": types.FIT_REFERENCE}


@asynccontextmanager
async def connect(
    target: str,
    *,
    credentials: grpc.ChannelCredentials | None = None,
    token: str = "",
    plaintext_token: bool = False,
) -> AsyncGenerator["Avatar", None]:
    """A gateway, while the body runs. Nothing is asked of it before the first call.

    target: HOST:PORT. credentials: for TLS, such as `channel_credentials(ca="ca.pem")`; plain text without them.
    token: sent with every call as `authorization: Bearer TOKEN`, if there is one.
    plaintext_token: send it in plain text to another machine too, where something else encrypts what lies between.
    ValueError if a token would leave this machine in plain text.
    """
    if token and not credentials and not plaintext_token and not _is_here(target):
        raise ValueError(
            f"the token would be sent to {target} in plain text; give credentials, or plaintext_token=True"
        )
    channel = (
        grpc.aio.secure_channel(target, credentials, options=OPTIONS)
        if credentials
        else grpc.aio.insecure_channel(target, options=OPTIONS)
    )
    async with channel:
        metadata = [("authorization", f"Bearer {token}")] if token else []
        yield Avatar(pb_grpc.AvatarServiceStub(channel), metadata)


def _is_here(target: str) -> bool:
    """Whether what is sent to HOST:PORT stays on this machine."""
    host = target.rpartition(":")[0].rpartition("/")[2].strip("[]")
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return target.startswith("unix:")


class Avatar:
    """A gateway. Made by `connect`."""

    def __init__(self, stub: "AvatarServiceAsyncStub", metadata: Sequence[tuple[str, str]]) -> None:
        self._stub = stub
        self._metadata = metadata
        self._limits: pb.GetCapabilitiesResponse | None = None

    async def capabilities(self) -> pb.GetCapabilitiesResponse:
        """What the deployment can do: sizes, encodings and limits, each explained in avatar_service.proto."""
        return await _call(
            self._stub.GetCapabilities(pb.GetCapabilitiesRequest(), timeout=CALL_S, metadata=self._metadata)
        )

    async def create(
        self,
        portrait: bytes | str | PathLike[str],
        *,
        seed: int | None = None,
        prompt: str = "",
        width: int = 0,
        height: int = 0,
        area: int = 0,
        fit: Literal["", "cover", "reference"] = "",
        ttl_s: float | None = None,
        sink_update_block: int | None = None,
        sink_distance: tuple[int, int] | None = None,
        audio_context_s: float | None = None,
    ) -> "Session":
        """A new session of a person.

        portrait: a PNG, JPEG or WebP file, or where it is. Everything else is the deployment's choice unless it is set,
        and explained in CreateReferenceRequest and CreateSessionRequest; sink_distance: smallest and largest.
        """
        picture = portrait if isinstance(portrait, bytes) else await asyncio.to_thread(Path(portrait).read_bytes)
        wanted = pb.CreateReferenceRequest(picture=picture, width=width, height=height, area=area, fit=FITS[fit])
        made = await _call(self._stub.CreateReference(wanted, timeout=CREATE_S, metadata=self._metadata))
        request = pb.CreateSessionRequest(
            reference_id=made.reference.id, seed=seed, prompt=prompt, sink_update_block=sink_update_block
        )
        if sink_distance is not None:
            request.min_sink_distance, request.max_sink_distance = sink_distance
        if ttl_s is not None:
            request.ttl.FromMilliseconds(round(ttl_s * 1000))
        if audio_context_s is not None:
            request.audio_context.FromMilliseconds(round(audio_context_s * 1000))
        created = await _call(self._stub.CreateSession(request, timeout=CALL_S, metadata=self._metadata))
        return Session(self, self._stub, self._metadata, created.session, made.reference.notice)

    async def session(self, session_id: str) -> "Session":
        """A session that was created before, here or elsewhere."""
        request = pb.GetSessionRequest(session_id=session_id)
        found = await _call(self._stub.GetSession(request, timeout=CALL_S, metadata=self._metadata))
        return Session(self, self._stub, self._metadata, found.session)

    async def limits(self) -> pb.GetCapabilitiesResponse:
        """The capabilities as they were when somebody first asked."""
        self._limits = self._limits or await self.capabilities()
        return self._limits


class Session:
    """One conversation with one person. Made by `Avatar.create`.

    info: the session as it was when it was made. notice: what is unusual about the portrait, in words, if anything is.
    """

    def __init__(
        self,
        avatar: Avatar,
        stub: "AvatarServiceAsyncStub",
        metadata: Sequence[tuple[str, str]],
        info: types.Session,
        notice: str = "",
    ) -> None:
        self.info = info
        self.notice = notice
        self._avatar = avatar
        self._stub = stub
        self._metadata = metadata

    @property
    def id(self) -> str:
        """Unguessable name: who knows it can stream, interrupt and delete."""
        return self.info.id

    @property
    def video(self) -> types.VideoFormat:
        """Width, height and frame rate."""
        return self.info.video

    @asynccontextmanager
    async def stream(
        self,
        *,
        sound: Sound | None = None,
        rate_hz: int = 16000,
        channels: Literal[1, 2] = 1,
        encoding: Encoding = "pcm16",
        live: bool = False,
        video: Video = "rgb24",
        quality: int = 0,
        per_block: bool = False,
        return_audio: bool = False,
    ) -> AsyncGenerator[Stream, None]:
        """The session's stream, while the body runs. A session has one, once.

        sound: all that is to be said, in pieces of any size, pushed while the body runs; the stream is closed after it.
            Without it the body pushes, and closes.
        rate_hz, channels, encoding: format of the sound. live: in real time, idling when no sound comes; otherwise as
            fast as it can. video, quality: how frames are encoded; `GetCapabilities` says which there are.
        per_block: all frames of a block come in one message; they are still iterated one by one.
        return_audio: the sound comes back beside the frames.

        If the connection breaks, the stream goes on over another one, for as long as the gateway waits. A body that
        leaves before all frames have come gives the session up: it is deleted, so that its place is free at once.
        """
        opening = pb.OpenAvatar(
            session_id=self.id,
            audio=types.AudioFormat(encoding=ENCODINGS[encoding], rate_hz=rate_hz, num_channels=channels),
            mode=pb.OpenAvatar.MODE_LIVE if live else pb.OpenAvatar.MODE_OFFLINE,
            output=types.VideoOutput(encoding=VIDEOS[video], quality=quality, per_block=per_block),
            return_audio=return_audio,
        )
        stream = Stream(self._stub, self._metadata, opening, await self._avatar.limits())
        await stream.open()
        try:
            async with background(stream.run(sound)):
                yield stream
        finally:
            if not stream.closed:
                with suppress(AvatarError):
                    await self.delete(timeout_s=GIVE_UP_S)

    async def refresh(self) -> types.Session:
        """The session as it is now; `info` too."""
        request = pb.GetSessionRequest(session_id=self.id)
        self.info = (await _call(self._stub.GetSession(request, timeout=CALL_S, metadata=self._metadata))).session
        return self.info

    async def update(self, *, prompt: str | None = None, ttl_s: float | None = None) -> int | None:
        """Change what is given; the first block that is made under a changed prompt, where the gateway knows it."""
        request = pb.UpdateSessionRequest(session=types.Session(id=self.id))
        if prompt is not None:
            request.session.prompt = prompt
            request.update_mask.paths.append("prompt")
        if ttl_s is not None:
            request.session.ttl.FromMilliseconds(round(ttl_s * 1000))
            request.update_mask.paths.append("ttl")
        updated = await _call(self._stub.UpdateSession(request, timeout=CALL_S, metadata=self._metadata))
        self.info = updated.session
        return updated.first_block if updated.HasField("first_block") else None

    async def interrupt(self) -> Interrupted:
        """Have the session fall silent, from anywhere; in the stream's own tasks `Stream.interrupt` is better."""
        request = pb.InterruptRequest(session_id=self.id)
        return interrupted_of(await _call(self._stub.Interrupt(request, timeout=CALL_S, metadata=self._metadata)))

    async def delete(self, *, timeout_s: float = CALL_S) -> None:
        """Forget the session. Its stream, if one is open, ends with SessionNotFound."""
        request = pb.DeleteSessionRequest(session_id=self.id)
        await _call(self._stub.DeleteSession(request, timeout=timeout_s, metadata=self._metadata))


async def _call(call: Awaitable[Answer]) -> Answer:
    """What a call answers. Raises the AvatarError that the gateway ended it with."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise error_of(error) from error
