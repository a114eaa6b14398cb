"""What a client may choose, for a session beyond its picture and for a stream, in the words of the two contracts."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
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
# One of the audio encoder's frames.
FRAME_NS = 20_000_000
Sink: TypeAlias = Literal["sink_update_block", "min_sink_distance", "max_sink_distance"]
SINK: tuple[Sink, ...] = get_args(Sink)


@dataclass(frozen=True)
class Choices:
    """What a client chose when it opened a stream.

    encoding, rate_hz, num_channels: of its sound. video, quality: of its frames, as workers call them.
    """

    encoding: str
    rate_hz: int
    num_channels: int
    video: str
    quality: int = 0
    is_live: bool = False
    is_per_block: bool = False
    returns_audio: bool = False

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample of all channels."""
        return SAMPLE_BYTES[self.encoding] * self.num_channels


def choices_of(opened: pb.OpenAvatar) -> Choices:
    """What an `open` chooses. InvalidAudio or InvalidField if there is no such format of sound, or of frames."""
    sound, output = opened.audio, opened.output
    if sound.encoding not in SAMPLE_ENCODINGS:
        raise InvalidAudio.at("open.audio.encoding", "expected PCM16 or FLOAT32")
    if not MIN_RATE_HZ <= sound.rate_hz <= MAX_RATE_HZ:
        raise InvalidAudio.at("open.audio.rate_hz", f"{sound.rate_hz} Hz, expected {MIN_RATE_HZ} to {MAX_RATE_HZ}")
    if sound.num_channels not in (1, 2):
        raise InvalidAudio.at("open.audio.num_channels", f"{sound.num_channels}, expected 1 or 2")
    if opened.mode not in pb.OpenAvatar.Mode.values():
        raise InvalidField.at("open.mode", f"{opened.mode} is no mode")
    video = output.encoding or types.VIDEO_ENCODING_RGB24
    if video not in VIDEO_ENCODINGS:
        raise InvalidField.at("open.output.encoding", f"{output.encoding} is no encoding of frames")
    if output.quality > MAX_QUALITY:
        raise InvalidField.at("open.output.quality", f"{output.quality}, expected 1 to {MAX_QUALITY}, or 0")
    return Choices(
        encoding=SAMPLE_ENCODINGS[sound.encoding],
        rate_hz=sound.rate_hz,
        num_channels=sound.num_channels,
        video=VIDEO_ENCODINGS[video],
        quality=output.quality,
        is_live=opened.mode == pb.OpenAvatar.MODE_LIVE,
        is_per_block=output.per_block,
        returns_audio=opened.return_audio,
    )


async def set_choices(
    session: types_pb2.Session, request: pb.CreateSessionRequest, max_right_frames: Callable[[], Awaitable[int]]
) -> None:
    """Note in a session what the request chooses. InvalidField if it cannot be had.

    max_right_frames: asks the audio worker for the longest context, in frames.
    """
    if request.HasField("min_sink_distance") != request.HasField("max_sink_distance"):
        raise InvalidField.at("min_sink_distance", "set it together with max_sink_distance")
    if request.min_sink_distance > request.max_sink_distance:
        distances = f"{request.min_sink_distance} to {request.max_sink_distance}"
        raise InvalidField.at("min_sink_distance", f"{distances} latent frames is no range")
    for name in SINK:
        if request.HasField(name):
            setattr(session, name, getattr(request, name))
    if request.HasField("audio_context"):
        frames, rest = divmod(request.audio_context.ToNanoseconds(), FRAME_NS)
        most = await max_right_frames()
        if rest or not 0 <= frames <= most:
            allowed = f"whole 20 ms up to {most * FRAME_NS / 1e9:g} s" if most else "nothing: it cannot be chosen here"
            raise InvalidField.at("audio_context", f"{frames * FRAME_NS + rest} ns, expected {allowed}")
        session.audio_right_frames = frames


def show_choices(kept: types_pb2.Session, session: types.Session) -> None:
    """Tell a client what its session was created with."""
    session.prompt = kept.prompt
    for name in SINK:
        if kept.HasField(name):
            setattr(session, name, getattr(kept, name))
    if kept.HasField("audio_right_frames"):
        session.audio_context.FromNanoseconds(kept.audio_right_frames * FRAME_NS)


def context_s(max_right_frames: int) -> float:
    """The longest context in seconds."""
    return max_right_frames * FRAME_NS / 1e9
