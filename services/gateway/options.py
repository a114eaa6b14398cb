"""Options of sessions and streams, translated between the public and the worker contract."""

from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal, TypeAlias, get_args

from avatar.errors import InvalidAudio, InvalidField
from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import types_pb2 as types
from avatar.worker.v1 import types_pb2

MIN_RATE_HZ, MAX_RATE_HZ = 8000, 48000
MAX_QUALITY = 100
SAMPLE_ENCODINGS = {types.SAMPLE_ENCODING_PCM16: "pcm16", types.SAMPLE_ENCODING_FLOAT32: "float32"}
SAMPLE_BYTES = {"pcm16": 2, "float32": 4}
VIDEO_ENCODINGS = {
    types.VIDEO_ENCODING_RGB24: "rgb24",
    types.VIDEO_ENCODING_JPEG: "jpeg",
    types.VIDEO_ENCODING_H264: "h264",
    types.VIDEO_ENCODING_FMP4: "fmp4",
}
ENCODING_OF = {name: encoding for encoding, name in VIDEO_ENCODINGS.items()}
MARKS = {"xmp": types.MARK_XMP, "sei": types.MARK_SEI, "label": types.MARK_LABEL}
# Duration of one frame of the audio encoder.
FRAME_NS = 20_000_000
SinkOption: TypeAlias = Literal["sink_update_block", "min_sink_distance", "max_sink_distance"]
SINK_OPTIONS: tuple[SinkOption, ...] = get_args(SinkOption)


@dataclass(frozen=True)
class AudioOptions:
    """Format of audio: the encoding in the workers' words, the rate, and 1 or 2 channels."""

    encoding: str
    rate_hz: int
    num_channels: int

    @cached_property
    def sample_bytes(self) -> int:
        """Bytes of one sample of all channels."""
        return SAMPLE_BYTES[self.encoding] * self.num_channels


@dataclass(frozen=True)
class StreamOptions(AudioOptions):
    """Options of a stream, from the `open` message of its client: the format of its audio, and others.

    video, quality: of the frames, in the workers' words.
    is_per_block: a block's frames travel in one message. is_per_latent: H.264 groups frames by latent frame.
    takes_chunks: frames that are ready together travel in one message.
    returns_audio: frames are accompanied by their audio.
    other_heard: format of the other person's audio, if it is another.
    """

    video: str
    quality: int = 0
    is_live: bool = False
    is_per_block: bool = False
    is_per_latent: bool = False
    takes_chunks: bool = False
    returns_audio: bool = False
    other_heard: AudioOptions | None = None

    @property
    def heard(self) -> AudioOptions:
        """Format of the other person's audio."""
        return self.other_heard or self

    @cached_property
    def is_always_key(self) -> bool:
        """True if every frame can be decoded alone."""
        return self.video in ("rgb24", "jpeg")

    @cached_property
    def waits_for_block(self) -> bool:
        """True if no frame of a block is sent before the whole block is decoded."""
        return self.is_per_block or not (self.is_always_key or self.is_per_latent)


def stream_options(opened: pb.OpenAvatar) -> StreamOptions:
    """Return the options of an `open` message. InvalidAudio or InvalidField if an audio or video format is unknown."""
    audio, output = _audio_options(opened.audio, "open.audio"), opened.output
    if opened.mode not in pb.OpenAvatar.Mode.values():
        raise InvalidField.at("open.mode", f"{opened.mode} is no mode")
    video = output.encoding or types.VIDEO_ENCODING_RGB24
    if video not in VIDEO_ENCODINGS:
        raise InvalidField.at("open.output.encoding", f"{output.encoding} is no encoding of frames")
    if output.quality > MAX_QUALITY:
        raise InvalidField.at("open.output.quality", f"{output.quality}, expected 1 to {MAX_QUALITY}, or 0")
    return StreamOptions(
        **asdict(audio),
        video=VIDEO_ENCODINGS[video],
        quality=output.quality,
        is_live=opened.mode == pb.OpenAvatar.MODE_LIVE,
        is_per_block=output.per_block,
        is_per_latent=output.per_latent,
        takes_chunks=output.takes_chunks,
        returns_audio=opened.return_audio,
        other_heard=_audio_options(opened.listen, "open.listen") if opened.HasField("listen") else None,
    )


def _audio_options(audio: types.AudioFormat, field: str) -> AudioOptions:
    """Return a format of audio. field: the name that errors give it. InvalidAudio if a value is out of range."""
    if audio.encoding not in SAMPLE_ENCODINGS:
        raise InvalidAudio.at(f"{field}.encoding", "expected PCM16 or FLOAT32")
    if not MIN_RATE_HZ <= audio.rate_hz <= MAX_RATE_HZ:
        raise InvalidAudio.at(f"{field}.rate_hz", f"{audio.rate_hz} Hz, expected {MIN_RATE_HZ} to {MAX_RATE_HZ}")
    if audio.num_channels not in (1, 2):
        raise InvalidAudio.at(f"{field}.num_channels", f"{audio.num_channels}, expected 1 or 2")
    return AudioOptions(SAMPLE_ENCODINGS[audio.encoding], audio.rate_hz, audio.num_channels)


async def set_session_options(
    session: types_pb2.Session, request: pb.CreateSessionRequest, max_right_frames: Callable[[], Awaitable[int]]
) -> None:
    """Copy the request's options into a session. InvalidField if one is out of range.

    max_right_frames: asks the audio worker for the longest audio context, in encoder frames.
    """
    if request.HasField("min_sink_distance") != request.HasField("max_sink_distance"):
        raise InvalidField.at("min_sink_distance", "set it together with max_sink_distance")
    if request.min_sink_distance > request.max_sink_distance:
        distances = f"{request.min_sink_distance} to {request.max_sink_distance}"
        raise InvalidField.at("min_sink_distance", f"{distances} latent frames is no range")
    for name in SINK_OPTIONS:
        if request.HasField(name):
            setattr(session, name, getattr(request, name))
    if request.HasField("audio_context"):
        frames, remainder_ns = divmod(request.audio_context.ToNanoseconds(), FRAME_NS)
        limit = await max_right_frames()
        if remainder_ns or not 0 <= frames <= limit:
            allowed = f"a multiple of 20 ms up to {context_s(limit):g} s" if limit else "none: this checkpoint fixes it"
            raise InvalidField.at("audio_context", f"{frames * FRAME_NS + remainder_ns} ns, expected {allowed}")
        session.audio_right_frames = frames


def show_session_options(stored: types_pb2.Session, session: types.Session) -> None:
    """Copy the options that a session was created with into the client's view of it."""
    session.prompt, session.label = stored.prompt, stored.label
    for name in SINK_OPTIONS:
        if stored.HasField(name):
            setattr(session, name, getattr(stored, name))
    if stored.HasField("audio_right_frames"):
        session.audio_context.FromNanoseconds(stored.audio_right_frames * FRAME_NS)


def context_s(right_frames: int) -> float:
    """Return the duration of an audio context, in seconds."""
    return right_frames * FRAME_NS / 1e9
