"""What a client may choose for a session beyond its picture, in the words of the two contracts."""

from collections.abc import Awaitable, Callable
from typing import Literal, TypeAlias, get_args

from avatar.errors import InvalidField
from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import types_pb2 as types
from avatar.worker.v1 import types_pb2

# One of the audio encoder's frames.
FRAME_NS = 20_000_000
Sink: TypeAlias = Literal["sink_update_block", "min_sink_distance", "max_sink_distance"]
SINK: tuple[Sink, ...] = get_args(Sink)


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
    for name in SINK:
        if kept.HasField(name):
            setattr(session, name, getattr(kept, name))
    if kept.HasField("audio_right_frames"):
        session.audio_context.FromNanoseconds(kept.audio_right_frames * FRAME_NS)


def context_s(max_right_frames: int) -> float:
    """The longest context in seconds."""
    return max_right_frames * FRAME_NS / 1e9
