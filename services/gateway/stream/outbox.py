"""What goes to a client: in order, bounded, numbered when it is sent, and kept for a while to be sent again.

    put -> waiting -> drain -> kept

What waits has no numbers yet, so that it can be dropped without a gap. Frames wait for room, everything else does not:
there are a few events to a block.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from avatar.errors import InvalidField, ResumeImpossible, SlowReader
from avatar.v1 import avatar_service_pb2 as api
from avatar.v1 import types_pb2 as api_types
from avatar.worker.v1 import types_pb2
from services.gateway.stream.fragments import renumbered
from services.gateway.stream.timeline import Grid

Write: TypeAlias = Callable[[api.StreamAvatarResponse], Awaitable[None]]
# Blocks of frames that may wait: one that is sent, one that is made, and one between.
MAX_WAITING_BLOCKS = 3
# Messages of events and frames that wait before no more are taken of a client, and that are kept; a block of frames,
# one by one with their sound, is two dozen.
MAX_WAITING_ITEMS, MAX_KEPT_ITEMS = 500, 2000


@dataclass(eq=False)
class Item:
    """What is sent, and dropped, as one. Once it is sent its messages have their numbers.

    messages: in order; without numbers at first.
    num_frames: that they hold; 0 in an event.
    turn, num_samples: the turn whose speech the frames show, and how much of it is shown by their end; or the turn that
        the event is about, and all of its speech.
    num_shown: how much of all that the client sent is shown by the frames' end; None if they show nothing of it.
    first: number of the next frame when it was sent.
    """

    messages: list[api.StreamAvatarResponse]
    num_frames: int = 0
    turn: int | None = None
    num_samples: int = 0
    num_shown: int | None = None
    first: int = 0
    num_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_bytes = sum(message.ByteSize() for message in self.messages)


class Outbox:
    """One session's way out.

    next_frame: number of the next frame that is sent. num_frames: how many were.
    num_waiting_frames: frames that wait.
    next_event: number of the next event. num_shown: samples of the client's whose frames were sent, or never will be.
    kept_frames, kept_bytes: how much of what was sent is kept.
    """

    def __init__(
        self, grid: Grid, position: types_pb2.Position, kept_frames: int, kept_bytes: int, *, is_fragmented: bool
    ) -> None:
        self.next_frame = position.next_frame
        self.next_event = position.next_event
        self.num_shown = position.num_samples
        self.num_frames = 0
        self.num_waiting_frames = 0
        # The turn whose speech was sent last, and how many samples of it.
        self._shown: tuple[int | None, int] = (position.turn, position.num_turn_samples)
        self._unfinished_turn = position.turn
        self._grid = grid
        self._kept_frames, self._kept_bytes = kept_frames, kept_bytes
        self._num_kept_frames = self._num_kept_bytes = 0
        self._is_fragmented = is_fragmented
        self._kept: deque[Item] = deque()
        self._waiting: deque[Item] = deque()
        self._again: deque[Item] = deque()
        self._is_finished = False
        self._room, self._more = asyncio.Event(), asyncio.Event()

    @property
    def is_full(self) -> bool:
        """Whether a frame that is put has to wait."""
        return self.num_waiting_frames >= MAX_WAITING_BLOCKS * self._grid.block_frames

    @property
    def has_speech(self) -> bool:
        """Whether frames of speech wait."""
        return any(item.num_frames and item.turn is not None for item in self._waiting)

    async def until_room(self) -> None:
        """Wait until frames may be put."""
        while self.is_full:
            self._room.clear()
            await self._room.wait()

    async def until_few(self) -> None:
        """Wait until what a client causes by its messages may be put: events wait no less than frames."""
        while len(self._waiting) >= MAX_WAITING_ITEMS:
            self._room.clear()
            await self._room.wait()

    def put(self, item: Item) -> None:
        """Have something sent after all that waits."""
        self.num_waiting_frames += item.num_frames
        self._waiting.append(item)
        self._more.set()

    def drop(self) -> int:
        """Forget the frames that wait; how many samples were shown of the speech that this cuts off."""
        self._waiting = deque(item for item in self._waiting if not (item.num_frames or _is_start(item)))
        self.num_waiting_frames = 0
        self._room.set()
        cut = [item.turn for item in self._waiting if _is_end(item) and self._shown_of(item.turn) < item.num_samples]
        return self._shown_of(cut[0]) if cut else 0

    def note(self, position: types_pb2.Position) -> None:
        """Write how far what was sent is."""
        position.next_frame, position.next_event = self.next_frame, self.next_event
        position.turn, position.num_turn_samples = self._unfinished_turn, self._shown_of(self._unfinished_turn)

    def finish(self) -> None:
        """Nothing more is put: `drain` returns when all is sent."""
        self._is_finished = True
        self._more.set()

    def kept_from(self, frame: int) -> list[Item]:
        """What was sent from this frame on, with the events before it.

        ResumeImpossible if it is no longer kept; InvalidField if it was never sent.
        """
        if frame > self.next_frame:
            raise InvalidField.at("open.resume.next_frame", f"{frame} was not sent yet, {self.next_frame} is the next")
        items = [*self._kept]
        at = next((i for i, item in enumerate(items) if item.num_frames and item.first == frame), len(items))
        if at == len(items) and frame < self.next_frame:
            raise ResumeImpossible(f"frame {frame} is no longer kept, or no message begins with it")
        while at and not items[at - 1].num_frames:
            at -= 1
        return items[at:]

    def again_from(self, frame: int) -> None:
        """Let the next `drain` begin with this frame, and with the events before it. Raises as `kept_from`."""
        self._again = deque(self.kept_from(frame))

    async def drain(self, write: Write, max_unread_s: float) -> None:
        """Send all that is put, until there is nothing more. SlowReader if the client takes nothing for so long."""
        while (item := await self._next()) is not None:
            for message in item.messages:
                try:
                    async with asyncio.timeout(max_unread_s):
                        await write(message)
                except TimeoutError as error:
                    raise SlowReader(f"nothing was read for {max_unread_s:g} s") from error

    async def _next(self) -> Item | None:
        """The next item, which from here on counts as sent."""
        while not (self._again or self._waiting or self._is_finished):
            self._more.clear()
            await self._more.wait()
        if self._again:
            return self._again.popleft()
        if not self._waiting:
            return None
        item = self._waiting.popleft()
        self._number(item)
        self._keep(item)
        self._room.set()
        return item

    def _number(self, item: Item) -> None:
        item.first = self.next_frame
        for message in item.messages:
            match message.WhichOneof("part"):
                case "frame":
                    self._number_frames([message.frame])
                case "chunk":
                    self._number_frames(message.chunk.frames)
                case "audio":
                    message.audio.pts_us = self._grid.pts_us(self.next_frame)
                case "event":
                    message.event.number = self.next_event
                    message.event.pts_us = self._grid.pts_us(self.next_frame)
                    if message.event.HasField("playback_finished"):
                        self._finish(message.event.playback_finished, item)
                    self.next_event += 1
                case "interrupted":
                    message.interrupted.next_frame = self.next_frame
                case "closed":
                    message.closed.num_frames = self.num_frames
        self.num_waiting_frames -= item.num_frames
        if item.num_shown is not None:
            self.num_shown = item.num_shown
        if item.num_frames and item.turn is not None:
            self._shown = (item.turn, item.num_samples)

    def _finish(self, finished: api.PlaybackFinished, item: Item) -> None:
        """How a turn has ended is known only now: an interrupt may have dropped its last frames."""
        shown = self._shown_of(item.turn)
        finished.next_frame = self.next_frame
        finished.position_us = self._grid.duration_us(shown)
        finished.interrupted |= shown < item.num_samples
        self._unfinished_turn = finished.turn + 1

    def _shown_of(self, turn: int | None) -> int:
        return self._shown[1] if self._shown[0] == turn else 0

    def _number_frames(self, frames: Sequence[api_types.VideoFrame]) -> None:
        for frame in frames:
            frame.index = self.next_frame
            frame.pts_us = self._grid.pts_us(frame.index)
            if self._is_fragmented:
                frame.data = renumbered(frame.data, frame.index)
            self.next_frame += frame.num_frames
            self.num_frames += frame.num_frames

    def _keep(self, item: Item) -> None:
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


def _is_start(item: Item) -> bool:
    return item.messages[0].event.WhichOneof("kind") == "playback_started"


def _is_end(item: Item) -> bool:
    return item.messages[0].event.WhichOneof("kind") == "playback_finished"
