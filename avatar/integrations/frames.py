"""Frames of a live stream, each with its audio, without those that an interrupt has dropped or that nobody took."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import asynccontextmanager
from os import PathLike
from types import MappingProxyType
from typing import Any

from avatar.aio import ChangeSignal, background
from avatar.client import Audio, Frame, Item, PlaybackFinished, Session, Stream, connect

SAMPLE_BYTES = 2
# Video that is held for whoever takes the frames. Three blocks arrive early where speech follows idle frames.
HELD_S = 2.5
NO_ARGUMENTS: Mapping[str, Any] = MappingProxyType({})


@asynccontextmanager
async def created_session(
    target: str, portrait: bytes | str | PathLike[str], connection: Mapping[str, Any], options: Mapping[str, Any]
) -> AsyncGenerator[Session, None]:
    """Connect to a gateway while the body runs, and create a session. The mappings have further arguments of `connect`
    and of `Avatar.create`."""
    async with connect(target, **connection) as avatar:
        yield await avatar.create(portrait, **options)


@asynccontextmanager
async def live_frames(session: Session, *, rate_hz: int) -> AsyncGenerator["LiveFrames", None]:
    """Open a session's live stream of mono PCM16 while the body runs; the session is deleted afterwards."""
    async with session.stream(rate_hz=rate_hz, live=True, return_audio=True) as stream:
        frames = LiveFrames(stream, session.video.frame_rate_hz, rate_hz)
        async with background(frames.receive()) as frames.receiving:
            yield frames


class LiveFrames:
    """The frames of a live stream and its ends of turns. Created by `live_frames`; iterate it once.

    A framework counts what it plays and stops counting when it interrupts, so nothing from before the interrupt may
    follow. The stream is read at its own pace: if HELD_S of frames wait because nobody takes them, they and later ones
    are dropped with their audio, and whoever goes on begins with the newest. Ends of turns are kept.
    stream: to push audio and to end turns. receiving: the task of `receive`.
    """

    receiving: asyncio.Task[None]

    def __init__(self, stream: Stream, frame_rate_hz: int, rate_hz: int) -> None:
        self.stream = stream
        self._frame_rate_hz = frame_rate_hz
        self._rate_hz = rate_hz
        self._audio = b""  # of the frames that follow
        self._held: deque[tuple[Frame | PlaybackFinished, bytes]] = deque()
        self._changed = ChangeSignal()
        self._is_taken = self._is_abandoned = False
        self._has_ended = False
        self._first_frame = 0  # earlier frames are dropped
        self._num_interrupting = 0

    async def until_taken(self) -> None:
        """Wait until an item has been taken and another is asked for, or the stream has ended."""
        await self._changed.wait_until(lambda: self._is_taken or self._has_ended)

    def interrupt(self) -> Coroutine[Any, Any, None]:
        """Drop all items at once, and return a coroutine that interrupts the speech. Then the next items follow."""
        self._num_interrupting += 1
        return self._interrupt()

    async def _interrupt(self) -> None:
        try:
            self._first_frame = (await self.stream.interrupt()).next_frame
            self._audio = b""
        finally:
            self._num_interrupting -= 1

    async def receive(self) -> None:
        """Read the stream to its end. Raises its error, as the iteration does."""
        try:
            async for item in self.stream:
                if self.is_dropped(item):
                    continue
                match item:
                    case Audio():
                        self._audio += item.data
                    case Frame():
                        # A frame at a time: the queues of frameworks hold less than a block. Idle frames have no audio.
                        audio = self._audio_of(item)
                        self._hold_frame(item, b"" if item.is_idle else audio)
                    case PlaybackFinished():
                        self._held.append((item, b""))
                self._changed.notify()
        finally:
            self._has_ended = True
            self._changed.notify()

    def _hold_frame(self, frame: Frame, audio: bytes) -> None:
        num_frames = sum(isinstance(item, Frame) for item, _ in self._held)
        self._is_abandoned = self._is_abandoned or num_frames >= HELD_S * self._frame_rate_hz
        if self._is_abandoned:
            self._held = deque(held for held in self._held if not isinstance(held[0], Frame))
        self._held.append((frame, audio))

    async def __aiter__(self) -> AsyncGenerator[tuple[Frame | PlaybackFinished, bytes], None]:
        """Yield frames, each with its audio, which idle frames have not, and ends of turns."""
        while True:
            await self._changed.wait_until(lambda: self._held or self._has_ended)
            self._is_abandoned = False
            if not self._held:
                break
            item, audio = self._held.popleft()
            if not self.is_dropped(item):
                yield item, audio
                self._is_taken = True
                self._changed.notify()
        await self.receiving

    def is_dropped(self, item: Item) -> bool:
        """Return whether an item precedes the last interrupt."""
        match item:
            case Frame():
                is_before = item.index < self._first_frame
            case Audio():
                is_before = round(item.pts_s * self._frame_rate_hz) < self._first_frame
            case PlaybackFinished():
                is_before = item.next_frame <= self._first_frame
            case _:
                return False
        return is_before or self._num_interrupting > 0

    def _audio_of(self, frame: Frame) -> bytes:
        """Remove and return a frame's audio. Frames differ by a sample where the rates do not divide evenly."""
        rate_hz, frame_rate_hz = self._rate_hz, self._frame_rate_hz
        num_samples = (frame.index + 1) * rate_hz // frame_rate_hz - frame.index * rate_hz // frame_rate_hz
        num_bytes = num_samples * SAMPLE_BYTES
        audio, self._audio = self._audio[:num_bytes], self._audio[num_bytes:]
        return audio
