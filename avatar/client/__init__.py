"""The product team's client: a portrait and speech in, frames out.

    async with connect("127.0.0.1:7000") as avatar:
        session = await avatar.create("face.png")
        speech, rate_hz = read_wav("speech.wav")
        async with session.stream(audio=speech, rate_hz=rate_hz) as stream:
            async for frame in stream.frames():
                show(frame.data)

To a deployment with tenants: `connect(target, credentials=channel_credentials(ca="ca.pem"), token=token)`.

Needs grpcio, protobuf and googleapis-common-protos, which is pure Python. All errors are `AvatarError`s; `reason` is
one of the table in protos/avatar/v1/avatar_service.proto. An unreachable gateway raises the subclass `ConnectionLost`.
"""

from avatar.client.items import (
    Audio,
    Frame,
    Interrupted,
    Item,
    Notice,
    NoticeKind,
    PlaybackFinished,
    PlaybackStarted,
    WordStarted,
)
from avatar.client.session import Avatar, Session, connect
from avatar.client.stream import AudioSource, Stream
from avatar.client.wav import read_wav
from avatar.errors import AvatarError
from avatar.rpc.tls import channel_credentials

__all__ = [
    "Audio",
    "AudioSource",
    "Avatar",
    "AvatarError",
    "Frame",
    "Interrupted",
    "Item",
    "Notice",
    "NoticeKind",
    "PlaybackFinished",
    "PlaybackStarted",
    "Session",
    "Stream",
    "WordStarted",
    "channel_credentials",
    "connect",
    "read_wav",
]
