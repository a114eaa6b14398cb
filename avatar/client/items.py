"""What comes out of a stream, as a client sees it. Times are seconds on the session's media clock."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import types_pb2 as types


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame, or in fragmented MP4 the fragment of several.

    index: number of the frame in the session, the first is 3. pts_s: when it is shown on the session's media clock.
    data: the frame in the stream's encoding. is_idle: nobody speaks. is_key: it can be decoded without those before it.
    is_discontinuity: the picture may jump here, since what makes it was lost and rebuilt.
    """

    index: int
    pts_s: float
    data: bytes
    is_idle: bool
    is_key: bool
    num_frames: int
    is_discontinuity: bool = False


@dataclass(frozen=True, slots=True)
class Audio:
    """The sound of the frames that follow, in the format that was sent. pts_s: when it begins on the media clock."""

    pts_s: float
    data: bytes


@dataclass(frozen=True, slots=True)
class PlaybackStarted:
    """The first frame of a turn's speech follows. number: of the event. turn: from 0."""

    number: int
    pts_s: float
    turn: int


@dataclass(frozen=True, slots=True)
class PlaybackFinished:
    """The last frame of a turn's speech was before this, or the turn was interrupted.

    position_s: how much of the turn's sound was shown. next_frame: the first frame that is not of the turn.
    """

    number: int
    pts_s: float
    turn: int
    position_s: float
    was_interrupted: bool
    next_frame: int


class NoticeKind(Enum):
    """What a notice is about; `UNKNOWN` is one that this version does not know."""

    UNKNOWN = pb.Notice.KIND_UNSPECIFIED
    DEGRADED = pb.Notice.KIND_DEGRADED
    GOING_AWAY = pb.Notice.KIND_GOING_AWAY
    AUDIO_REFUSED = pb.Notice.KIND_AUDIO_REFUSED
    SLOW_READER = pb.Notice.KIND_SLOW_READER


@dataclass(frozen=True, slots=True)
class Notice:
    """Something to know; the stream goes on.

    within_s: seconds that are left, where there is a limit. num_samples: samples that were refused, where some were.
    """

    number: int
    pts_s: float
    kind: NoticeKind
    message: str
    within_s: float
    num_samples: int


@dataclass(frozen=True, slots=True)
class Interrupted:
    """What an interrupt cut off.

    next_frame: the first frame after it. position_s: how much of the turn's sound was shown.
    """

    next_frame: int
    position_s: float
    was_speaking: bool


Item: TypeAlias = Frame | Audio | PlaybackStarted | PlaybackFinished | Notice


def items_of(response: pb.StreamAvatarResponse) -> Iterator[Item]:
    """The items that a message holds; none if it is about the stream itself."""
    match response.WhichOneof("part"):
        case "frame":
            yield frame_of(response.frame)
        case "chunk":
            yield from map(frame_of, response.chunk.frames)
        case "audio":
            yield Audio(response.audio.pts_us / 1e6, response.audio.data)
        case "event":
            yield from events_of(response.event)


def frame_of(frame: types.VideoFrame) -> Frame:
    """A frame; a gateway that says nothing of keys and numbers sends raw frames."""
    num_frames, jumps = frame.num_frames or 1, frame.is_discontinuity
    return Frame(frame.index, frame.pts_us / 1e6, frame.data, frame.is_idle, frame.is_key, num_frames, jumps)


def events_of(event: pb.AvatarEvent) -> Iterator[Item]:
    """An event; nothing for a kind that this version does not know."""
    number, pts_s = event.number, event.pts_us / 1e6
    match event.WhichOneof("kind"):
        case "playback_started":
            yield PlaybackStarted(number, pts_s, event.playback_started.turn)
        case "playback_finished":
            end = event.playback_finished
            yield PlaybackFinished(number, pts_s, end.turn, end.position_us / 1e6, end.interrupted, end.next_frame)
        case "notice":
            told = event.notice
            kind = NoticeKind(told.kind) if told.kind in {each.value for each in NoticeKind} else NoticeKind.UNKNOWN
            yield Notice(number, pts_s, kind, told.message, told.within_s, told.num_samples)


def interrupted_of(told: pb.AvatarInterrupted | pb.InterruptResponse) -> Interrupted:
    """The answer to an interrupt, in the stream or from elsewhere."""
    return Interrupted(told.next_frame, told.position_us / 1e6, told.was_speaking)
