"""The way of messages to a client: in order, bounded, numbered when they are sent, and kept for resumption.

    put -> waiting -> drain -> kept

Waiting messages have no numbers, so they can be dropped without a gap. Frames wait for space; events need none, since
there are a few per block.
"""

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc.aio

from avatar.aio import WaitLimit
from avatar.errors import ConnectionLost, InvalidField, ResumeImpossible, SlowReader
from avatar.v1 import avatar_service_pb2 as api
from avatar.worker.v1 import types_pb2
from services.gateway.stream.fragments import renumber_fragment
from services.gateway.stream.in_flight import FIRST_FRAME, TurnText
from services.gateway.stream.timeline import US, MediaGrid

Write: TypeAlias = Callable[[api.StreamAvatarResponse], Awaitable[None]]
# Blocks of frames that may wait: one being sent, one being made, and one between.
MAX_WAITING_BLOCKS = 3
# Items that may wait before no more messages are read from the client, and that are kept. A block whose frames travel
# one by one with their audio is two dozen items.
MAX_WAITING_ITEMS, MAX_KEPT_ITEMS = 500, 2000


@dataclass(eq=False)
class Item:
    """Messages that are sent, dropped and kept as one.

    messages: in order; numbered when they are sent.
    num_frames: frames in them; 0 for an event.
    turn, num_samples: the turn whose speech the frames show, and how much of it is delivered with them; for an event,
        the turn that it is about, and all of its speech, or its speech before the word.
    text: of the turn that the event ends, if it is spoken from text.
    num_delivered: samples of all that the client sent whose frames are delivered with these; None if there are none.
    first_frame: number of the next frame when the item was sent.
    num_bytes: size of its frames and their audio; for an event, of the messages, once they are sent.
    """

    messages: list[api.StreamAvatarResponse]
    num_frames: int = 0
    turn: int | None = None
    num_samples: int = 0
    num_delivered: int | None = None
    text: TurnText | None = None
    first_frame: int = 0
    num_bytes: int = 0

    def is_event(self, kind: str) -> bool:
        return self.messages[0].event.WhichOneof("kind") == kind


def notice(kind: api.Notice.Kind.ValueType, message: str, **fields: Any) -> Item:
    """Return a notice to the client. fields: further ones of Notice."""
    content = api.Notice(kind=kind, message=message, **fields)
    return Item([api.StreamAvatarResponse(event=api.AvatarEvent(notice=content))])


class Outbox:
    """The outgoing messages of one session.

    next_frame, next_event: numbers of the next frame and event to be sent.
    end_frame: number that the next frame to be put will get.
    num_delivered: samples of the client's audio whose frames were sent, or never will be.
    last_frame_s: when a frame was last sent, in seconds of the event loop's clock.
    is_drained: set when everything is sent and nothing more follows.
    """

    def __init__(
        self,
        grid: MediaGrid,
        position: types_pb2.Position,
        *,
        kept_frames: int,
        kept_bytes: int,
        max_unread_s: float,
        is_fragmented: bool,
    ) -> None:
        """kept_frames, kept_bytes: how much of what was sent is kept. max_unread_s: seconds that a client may read
        nothing. is_fragmented: frames are MP4 fragments.
        """
        self.next_frame = position.next_frame
        self.next_event = position.next_event
        self.num_delivered = position.num_samples
        self.last_frame_s = -math.inf
        # The turn whose speech was sent last, and how many samples of it.
        self._last_speech: tuple[int | None, int] = (position.turn, position.num_turn_samples)
        self._unfinished_turn = position.turn
        self._grid = grid
        self._kept_frames, self._kept_bytes, self._max_unread_s = kept_frames, kept_bytes, max_unread_s
        self._is_fragmented = is_fragmented
        self._waiting: deque[Item] = deque()
        self._num_waiting_frames = 0
        self._kept: deque[Item] = deque()
        self._num_kept_frames = self._num_kept_bytes = 0
        self._repeated: deque[Item] = deque()
        self._is_finished = self._is_reader_slow = False
        self._has_space, self._has_items = asyncio.Event(), asyncio.Event()
        self.is_drained = asyncio.Event()

    @property
    def end_frame(self) -> int:
        return self.next_frame + self._num_waiting_frames

    @property
    def has_speech(self) -> bool:
        """True if frames of speech are waiting."""
        return any(item.num_frames and item.turn is not None for item in self._waiting)

    @property
    def has_frames(self) -> bool:
        """True if frames are waiting."""
        return self._num_waiting_frames > 0

    async def wait_for_space(self, *, warns: bool) -> None:
        """Wait until a block's frames may be put. warns: the client gets a notice, once, that it reads too slowly."""
        is_slow = self._num_waiting_frames >= MAX_WAITING_BLOCKS * self._grid.block_frames
        if is_slow and warns and not self._is_reader_slow:
            message = "frames are not read as fast as they are made"
            self.put(notice(api.Notice.KIND_SLOW_READER, message, within_s=self._max_unread_s))
        self._is_reader_slow = is_slow and warns
        while self._num_waiting_frames >= MAX_WAITING_BLOCKS * self._grid.block_frames:
            self._has_space.clear()
            await self._has_space.wait()

    async def wait_for_few_items(self, num_coming: Callable[[], int] = int) -> None:
        """Wait until a message of the client may cause another event: waiting events are bounded too.

        num_coming: returns the number of events that are certain to be put.
        """
        while len(self._waiting) + num_coming() >= MAX_WAITING_ITEMS:
            self._has_space.clear()
            await self._has_space.wait()

    def put(self, *items: Item) -> None:
        """Send items after all that are waiting."""
        self._num_waiting_frames += sum(item.num_frames for item in items)
        self._waiting.extend(items)
        self._has_items.set()

    def drop(self) -> tuple[int, str]:
        """Drop waiting frames; return which samples and text were delivered of the speech that this cuts off."""
        self._waiting = deque(item for item in self._waiting if not self._belongs_to_waiting_frames(item))
        self._num_waiting_frames = 0
        self._has_space.set()
        for item in self._waiting:
            delivered = self._delivered_of(item.turn)
            is_cut = delivered < item.num_samples or (item.text is not None and item.text.is_cut)
            if item.is_event("playback_finished") and is_cut:
                return delivered, item.text.spoken(delivered) if item.text else ""
        return 0, ""

    def _belongs_to_waiting_frames(self, item: Item) -> bool:
        is_late_word = item.is_event("word_started") and item.num_samples >= self._delivered_of(item.turn)
        return item.num_frames > 0 or item.is_event("playback_started") or is_late_word

    def record(self, position: types_pb2.Position) -> None:
        """Write into the position what was sent."""
        position.next_frame, position.next_event = self.next_frame, self.next_event
        position.turn, position.num_turn_samples = self._unfinished_turn, self._delivered_of(self._unfinished_turn)

    def finish(self) -> None:
        """End `drain` once everything is sent; nothing more is put."""
        self._is_finished = True
        self._has_items.set()

    def kept_from(self, frame: int) -> list[Item]:
        """Return what was sent from a frame on, with the events before it.

        ResumeImpossible if it is no longer kept; InvalidField if it was never sent.
        """
        if frame > self.next_frame:
            raise InvalidField.at("open.resume.next_frame", f"{frame} was not sent yet, {self.next_frame} is the next")
        items = list(self._kept)
        start = next((i for i, item in enumerate(items) if item.num_frames and item.first_frame == frame), len(items))
        if start == len(items) and frame < self.next_frame:
            raise ResumeImpossible(f"frame {frame} is no longer kept, or no message begins with it")
        while start and not items[start - 1].num_frames:
            start -= 1
        return items[start:]

    def repeat_from(self, frame: int) -> None:
        """Make the next `drain` begin with a frame, and with the events before it. Raises as `kept_from`."""
        self._repeated = deque(self.kept_from(frame))

    async def drain(self, write: Write) -> None:
        """Send everything until `finish`, then set `is_drained`.

        SlowReader if the client reads nothing for max_unread_s; ConnectionLost if it is gone.
        """
        limit = WaitLimit()
        while True:
            while not (self._repeated or self._waiting or self._is_finished):
                self._has_items.clear()
                await self._has_items.wait()
            if self._repeated:
                item = self._repeated.popleft()
            elif self._waiting:
                item = self._waiting.popleft()
                self._number(item)
                self._has_space.set()
            else:
                self.is_drained.set()
                return
            for message in item.messages:
                try:
                    with limit:
                        limit.set(self._max_unread_s)
                        await write(message)
                except TimeoutError as error:
                    raise SlowReader(f"nothing was read for {self._max_unread_s:g} s") from error
                except grpc.aio.BaseError as error:
                    raise ConnectionLost("the client is gone") from error

    def _number(self, item: Item) -> None:
        """Number an item's messages and keep it; from here on it counts as sent."""
        item.first_frame = self.next_frame
        for message in item.messages:
            match message.WhichOneof("part"):
                case "frame" | "chunk" as part:
                    for frame in [message.frame] if part == "frame" else message.chunk.frames:
                        frame.index, frame.pts_us = self.next_frame, self._pts_us()
                        if self._is_fragmented:
                            frame.data = renumber_fragment(frame.data, frame.index)
                        self.next_frame += frame.num_frames
                case "audio":
                    message.audio.pts_us = self._pts_us()
                case "event":
                    message.event.number = self.next_event
                    message.event.pts_us += self._pts_us()
                    if message.event.HasField("playback_finished"):
                        self._finish_turn(message.event.playback_finished, item)
                    self.next_event += 1
                case "interrupted":
                    message.interrupted.next_frame = self.next_frame
                case "closed":
                    message.closed.num_frames = self.next_frame - FIRST_FRAME
        self._num_waiting_frames -= item.num_frames
        if item.num_frames:
            self.last_frame_s = asyncio.get_running_loop().time()
        if item.num_delivered is not None:
            self.num_delivered = item.num_delivered
        if item.num_frames and item.turn is not None:
            self._last_speech = (item.turn, item.num_samples)
        item.num_bytes = item.num_bytes or sum(message.ByteSize() for message in item.messages)
        self._kept.append(item)
        self._num_kept_frames += item.num_frames
        self._num_kept_bytes += item.num_bytes
        while len(self._kept) > 1 and (
            self._num_kept_frames > self._kept_frames
            or self._num_kept_bytes > self._kept_bytes
            or len(self._kept) > MAX_KEPT_ITEMS
        ):
            oldest = self._kept.popleft()
            self._num_kept_frames -= oldest.num_frames
            self._num_kept_bytes -= oldest.num_bytes

    def _pts_us(self) -> int:
        """Return the next frame's time on the media clock, in microseconds."""
        return self.next_frame * US // self._grid.frame_rate_hz

    def _finish_turn(self, finished: api.PlaybackFinished, item: Item) -> None:
        """Say how a turn ended, which is only known now: an interrupt may have dropped its last frames."""
        delivered = self._delivered_of(item.turn)
        finished.next_frame = self.next_frame
        finished.position_us = self._grid.duration_us(delivered)
        finished.interrupted |= delivered < item.num_samples
        finished.spoken = item.text.spoken(delivered) if item.text else ""
        self._unfinished_turn = finished.turn + 1

    def _delivered_of(self, turn: int | None) -> int:
        """Return how many samples of a turn were delivered."""
        return self._last_speech[1] if self._last_speech[0] == turn else 0
