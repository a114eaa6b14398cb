"""Typed items that a stream yields. Times are seconds on the session's media clock."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import types_pb2 as types


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame, or in fragmented MP4 one fragment that holds a block's frames.

    index: number of the frame in the session, from 3. pts_s: presentation time. data: the frame in the stream's
    encoding. is_idle: the avatar idles, since there is no audio. is_key: it can be decoded without earlier frames.
    num_frames: frames in `data`. is_discontinuity: the picture may jump here, since a worker was lost and rebuilt.
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
    """Audio of the frames that follow, in the format that was sent. pts_s: its start time."""

    pts_s: float
    data: bytes


@dataclass(frozen=True, slots=True)
class PlaybackStarted:
    """The first frame of a turn's speech follows. number: of the event, from 0. turn: from 0."""

    number: int
    pts_s: float
    turn: int


@dataclass(frozen=True, slots=True)
class WordStarted:
    """A word of a turn's text begins, at `pts_s`.

    first_char: its place in the turn's text. position_s: amount of the turn's audio before it. is_estimated: the voice
    gives no times for words; this one may be wrong by some tenths of a second.
    """

    number: int
    pts_s: float
    turn: int
    word: str
    first_char: int
    position_s: float
    is_estimated: bool


@dataclass(frozen=True, slots=True)
class PlaybackFinished:
    """The last frame of a turn's speech has arrived, or the turn was interrupted.

    position_s: amount of the turn's audio whose frames were sent. next_frame: the first frame after the turn.
    spoken: text of the turn that was spoken.
    """

    number: int
    pts_s: float
    turn: int
    position_s: float
    was_interrupted: bool
    next_frame: int
    spoken: str = ""


class NoticeKind(Enum):
    """Subject of a notice; `UNKNOWN` for one that a newer gateway added."""

    UNKNOWN = pb.Notice.KIND_UNSPECIFIED
    DEGRADED = pb.Notice.KIND_DEGRADED
    GOING_AWAY = pb.Notice.KIND_GOING_AWAY
    AUDIO_REFUSED = pb.Notice.KIND_AUDIO_REFUSED
    SLOW_READER = pb.Notice.KIND_SLOW_READER
    TOO_SLOW = pb.Notice.KIND_TOO_SLOW
    TEXT_UNSPOKEN = pb.Notice.KIND_TEXT_UNSPOKEN


@dataclass(frozen=True, slots=True)
class Notice:
    """A warning or refusal; the stream continues.

    within_s: remaining time, 0 without a deadline. num_samples: samples per channel that were discarded, if any were.
    reason, turn: of text that is not spoken.
    """

    number: int
    pts_s: float
    kind: NoticeKind
    message: str
    within_s: float
    num_samples: int
    reason: str = ""
    turn: int | None = None


@dataclass(frozen=True, slots=True)
class Interrupted:
    """Answer to an interrupt.

    next_frame: the first frame after it. position_s: amount of the turn's audio whose frames were sent. spoken: text of
    the turn that was spoken.
    """

    next_frame: int
    position_s: float
    was_speaking: bool
    spoken: str = ""


Item: TypeAlias = Frame | Audio | PlaybackStarted | PlaybackFinished | WordStarted | Notice


def items_from_pb(response: pb.StreamAvatarResponse) -> Iterator[Item]:
    """Yield the items of a message; none for a message about the stream itself."""
    match response.WhichOneof("part"):
        case "frame":
            yield frame_from_pb(response.frame)
        case "chunk":
            yield from map(frame_from_pb, response.chunk.frames)
        case "audio":
            yield Audio(response.audio.pts_us / 1e6, response.audio.data)
        case "event":
            yield from events_from_pb(response.event)


def frame_from_pb(frame: types.VideoFrame) -> Frame:
    """Return a frame; `num_frames` defaults to 1, since older gateways do not set it."""
    num_frames, is_discontinuity = frame.num_frames or 1, frame.is_discontinuity
    return Frame(frame.index, frame.pts_us / 1e6, frame.data, frame.is_idle, frame.is_key, num_frames, is_discontinuity)


def events_from_pb(event: pb.AvatarEvent) -> Iterator[Item]:
    """Yield an event; nothing for a kind that a newer gateway added."""
    number, pts_s = event.number, event.pts_us / 1e6
    match event.WhichOneof("kind"):
        case "playback_started":
            yield PlaybackStarted(number, pts_s, event.playback_started.turn)
        case "playback_finished":
            end = event.playback_finished
            position_s = end.position_us / 1e6
            yield PlaybackFinished(number, pts_s, end.turn, position_s, end.interrupted, end.next_frame, end.spoken)
        case "word_started":
            word = event.word_started
            place = word.first_char, word.position_us / 1e6
            yield WordStarted(number, pts_s, word.turn, word.word, *place, word.is_estimated)
        case "notice":
            notice = event.notice
            kind = NoticeKind(notice.kind) if notice.kind in {each.value for each in NoticeKind} else NoticeKind.UNKNOWN
            about = notice.reason, notice.turn if notice.HasField("turn") else None
            yield Notice(number, pts_s, kind, notice.message, notice.within_s, notice.num_samples, *about)


def interrupted_from_pb(answer: pb.AvatarInterrupted | pb.InterruptResponse) -> Interrupted:
    """Return the answer to an interrupt on the stream or by the RPC."""
    return Interrupted(answer.next_frame, answer.position_us / 1e6, answer.was_speaking, answer.spoken)
