"""A gateway as the client sees it, and the sessions created on it."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import Literal, TypeVar

import grpc

from avatar.aio import background
from avatar.client.connection import CALL_S, Connection, Response, is_local, open_channel
from avatar.client.items import Interrupted, interrupted_from_pb
from avatar.client.stream import AudioSource, Stream
from avatar.errors import AvatarError
from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import types_pb2 as types

Encoding = Literal["pcm16", "float32"]
Video = Literal["rgb24", "jpeg", "h264", "fmp4"]

# The VAE worker encodes a picture only when no block is waiting.
CREATE_S = 90.0
DELETE_S = 2.0
# A gateway ends a call right after its last message.
END_S = 0.5
ENCODINGS = {"pcm16": types.SAMPLE_ENCODING_PCM16, "float32": types.SAMPLE_ENCODING_FLOAT32}
VIDEOS = {
    "rgb24": types.VIDEO_ENCODING_RGB24,
    "jpeg": types.VIDEO_ENCODING_JPEG,
    "h264": types.VIDEO_ENCODING_H264,
    "fmp4": types.VIDEO_ENCODING_FMP4,
}
FITS = {
    "": types.FIT_UNSPECIFIED,
    "cover": types.FIT_COVER,
    "reference": types.FIT_REFERENCE,
    "face": types.FIT_FACE,
}

Value = TypeVar("Value")


def value_of(choices: Mapping[str, Value], name: str, choice: str) -> Value:
    """Return the choice's value. ValueError, with all choices, if there is no such choice."""
    if choice not in choices:
        raise ValueError(f"{name} must be {', '.join(map(repr, choices))}, got {choice!r}")
    return choices[choice]


@asynccontextmanager
async def connect(
    target: str,
    *,
    credentials: grpc.ChannelCredentials | None = None,
    token: str = "",
    plaintext_token: bool = False,
) -> AsyncGenerator["Avatar", None]:
    """Connect to a gateway while the body runs. The first call opens the connection.

    target: HOST:PORT. credentials: for TLS, such as `channel_credentials(ca="ca.pem")`; plain text without them.
    token: sent with every call as `authorization: Bearer TOKEN`, if not empty.
    plaintext_token: allow the token in plain text to another machine, for networks that encrypt by other means.
    Raises ValueError if a token would leave this machine in plain text.
    """
    if token and not credentials and not plaintext_token and not is_local(target):
        raise ValueError(
            f"the token would be sent to {target} in plain text; give credentials, or plaintext_token=True"
        )
    async with open_channel(target, credentials) as channel:
        yield Avatar(Connection(channel, token))


class Avatar:
    """A gateway. Created by `connect`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._limits: pb.GetCapabilitiesResponse | None = None

    async def capabilities(self) -> pb.GetCapabilitiesResponse:
        """Return the deployment's formats, sizes and limits, as documented in avatar_service.proto."""
        return await self._connection.call(self._connection.stub.GetCapabilities, pb.GetCapabilitiesRequest())

    async def create(
        self,
        portrait: bytes | str | PathLike[str],
        *,
        seed: int | None = None,
        prompt: str = "",
        width: int = 0,
        height: int = 0,
        area: int = 0,
        fit: Literal["", "cover", "reference", "face"] = "",
        ttl_s: float | None = None,
        sink_update_block: int | None = None,
        sink_distance: tuple[int, int] | None = None,
        audio_context_s: float | None = None,
        label: bool = False,
    ) -> "Session":
        """Create a session of a person.

        portrait: the bytes or the path of a PNG, JPEG, WebP, HEIC or AVIF file. All other arguments default to the
        deployment's choice and are documented in CreateReferenceRequest and CreateSessionRequest. sink_distance:
        smallest and largest, in latent frames. label: draw "AI" into every frame. ValueError if there is no such fit.
        """
        reference = await self._reference(portrait, width, height, area, fit)
        request = pb.CreateSessionRequest(
            reference_id=reference.id, seed=seed, prompt=prompt, sink_update_block=sink_update_block, label=label
        )
        if sink_distance is not None:
            request.min_sink_distance, request.max_sink_distance = sink_distance
        if ttl_s is not None:
            request.ttl.FromMilliseconds(round(ttl_s * 1000))
        if audio_context_s is not None:
            request.audio_context.FromMilliseconds(round(audio_context_s * 1000))
        created = await self._connection.call(self._connection.stub.CreateSession, request)
        return Session(self, self._connection, created.session, reference.notice)

    async def check_portrait(
        self,
        portrait: bytes | str | PathLike[str],
        *,
        width: int = 0,
        height: int = 0,
        area: int = 0,
        fit: Literal["", "cover", "reference", "face"] = "",
    ) -> str:
        """Return what is wrong with a portrait and what to do about it, in words; empty if nothing is.

        Arguments as of `create`. InvalidField if it cannot be used at all.
        """
        return (await self._reference(portrait, width, height, area, fit)).notice

    async def session(self, session_id: str) -> "Session":
        """Return an existing session, created by this client or another."""
        session = Session(self, self._connection, types.Session(id=session_id))
        await session.refresh()
        return session

    async def _reference(
        self, portrait: bytes | str | PathLike[str], width: int, height: int, area: int, fit: str
    ) -> types.Reference:
        """Create a reference, or find the same one again."""
        picture = portrait if isinstance(portrait, bytes) else await asyncio.to_thread(Path(portrait).read_bytes)
        request = pb.CreateReferenceRequest(
            picture=picture, width=width, height=height, area=area, fit=value_of(FITS, "fit", fit)
        )
        return (await self._connection.call(self._connection.stub.CreateReference, request, CREATE_S)).reference

    async def limits(self) -> pb.GetCapabilitiesResponse:
        """Return the capabilities, requested once and cached."""
        self._limits = self._limits or await self.capabilities()
        return self._limits


class Session:
    """A session: one person, one stream. Created by `Avatar.create`.

    info: the session's message as of the last call. notice: what is wrong with the portrait and what to do about it, in
    words; empty if nothing is.
    """

    def __init__(self, avatar: Avatar, connection: Connection, info: types.Session, notice: str = "") -> None:
        self.info = info
        self.notice = notice
        self._avatar = avatar
        self._connection = connection

    @property
    def id(self) -> str:
        """Secret name: anyone who has it can stream, interrupt and delete the session."""
        return self.info.id

    @property
    def video(self) -> types.VideoFormat:
        """Width, height and frame rate."""
        return self.info.video

    @asynccontextmanager
    async def stream(
        self,
        *,
        audio: AudioSource | None = None,
        rate_hz: int = 16000,
        channels: Literal[1, 2] = 1,
        encoding: Encoding = "pcm16",
        listen_rate_hz: int | None = None,
        live: bool = False,
        video: Video = "rgb24",
        quality: int = 0,
        per_block: bool = False,
        per_latent: bool = False,
        return_audio: bool = False,
    ) -> AsyncGenerator[Stream, None]:
        """Open the session's stream while the body runs. A session can be streamed once.

        audio: the whole speech, in pieces of any size, pushed while the body runs; the stream is then closed.
            Without it the body pushes audio and closes the stream itself.
        rate_hz, channels, encoding: format of the audio.
        listen_rate_hz: rate of what `Stream.listen` sends, whose channels and encoding are those of the audio; by
            default `rate_hz`.
        live: run in real time and idle without audio; otherwise as fast as possible.
        video, quality: encoding of the frames; `Avatar.capabilities` lists the supported ones.
        per_block: receive all frames of a block in one message; iteration still yields single frames.
        per_latent: H.264 and fragmented MP4 come in groups of four frames, as soon as these are decoded, and not in
            blocks.
        return_audio: receive the audio along with the frames.
        ValueError if there is no such encoding.

        If the connection breaks, the stream resumes on a new one within the gateway's `resume_s`. A body that exits
        before all frames have arrived deletes the session, which frees its capacity at once.
        """
        code = value_of(ENCODINGS, "encoding", encoding)
        audio_format, heard_format = (
            types.AudioFormat(encoding=code, rate_hz=each, num_channels=channels) if each else None
            for each in (rate_hz, listen_rate_hz)
        )
        opening = pb.OpenAvatar(
            session_id=self.id,
            audio=audio_format,
            listen=heard_format,
            mode=pb.OpenAvatar.MODE_LIVE if live else pb.OpenAvatar.MODE_OFFLINE,
            output=types.VideoOutput(
                encoding=value_of(VIDEOS, "video", video),
                quality=quality,
                per_block=per_block,
                per_latent=per_latent,
                takes_chunks=True,
            ),
            return_audio=return_audio,
        )
        stream = Stream(self._connection, opening, await self._avatar.limits())
        await stream.open()
        try:
            async with background(stream.run(audio)) as running:
                yield stream
                if stream.closed:  # read the call's status, too: without it the gateway would count it as cancelled
                    await asyncio.wait({running}, timeout=END_S)
        finally:
            if not stream.closed:
                with suppress(AvatarError):
                    await self.delete(timeout_s=DELETE_S)

    async def refresh(self) -> types.Session:
        """Update `info` and return it."""
        request = pb.GetSessionRequest(session_id=self.id)
        self.info = (await self._call(self._connection.stub.GetSession, request)).session
        return self.info

    async def update(self, *, prompt: str | None = None, ttl_s: float | None = None) -> int | None:
        """Change the prompt, the time to live, or both; return the first block rendered under a new prompt, or None."""
        request = pb.UpdateSessionRequest(session=types.Session(id=self.id))
        if prompt is not None:
            request.session.prompt = prompt
            request.update_mask.paths.append("prompt")
        if ttl_s is not None:
            request.session.ttl.FromMilliseconds(round(ttl_s * 1000))
            request.update_mask.paths.append("ttl")
        updated = await self._call(self._connection.stub.UpdateSession, request)
        self.info = updated.session
        return updated.first_block if updated.HasField("first_block") else None

    async def interrupt(self) -> Interrupted:
        """Stop the session's speech from outside its stream; tasks that hold the stream use `Stream.interrupt`."""
        request = pb.InterruptRequest(session_id=self.id)
        return interrupted_from_pb(await self._call(self._connection.stub.Interrupt, request))

    async def delete(self, *, timeout_s: float = CALL_S) -> None:
        """Delete the session. Its stream, if one is open, ends with SessionNotFound."""
        request = pb.DeleteSessionRequest(session_id=self.id)
        await self._call(self._connection.stub.DeleteSession, request, timeout_s)

    async def _call(
        self, method: Callable[..., Awaitable[Response]], request: object, timeout_s: float = CALL_S
    ) -> Response:
        return await self._connection.call(method, request, timeout_s, session_id=self.id)
