"""Playout of a live stream to a browser: when frames and audio are due, and the two WebRTC tracks that carry them.

    gateway's items -> Playout -> VideoTrack, AudioTrack -> browser

A live gateway sends a block as soon as it is rendered. Each frame and its audio are due at their time on the session's
media clock; an item that arrives late delays everything after it. Video and audio follow the same rule on the same
clock, so they cannot drift apart.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction

import numpy as np
from aiortc import MediaStreamTrack
from aiortc.mediastreams import MediaStreamError
from av import AudioFrame, VideoFrame

from avatar.client import Audio, Frame, Item

RATE_HZ = 24000  # the usual rate of speech synthesisers; Opus keeps no higher frequencies of a voice
TRACK_SAMPLES = RATE_HZ // 50
SAMPLE_BYTES = 2
# Delay of the first item after a late one, so that the track's next 20 ms of audio are complete.
MARGIN_S = 0.03
# Items queued before `put` waits: four blocks with their events.
MAX_QUEUED = 64
CLOCK_HZ = 90000


class Playout:
    """One session's video and audio, in order and on time.

    on_item: called with each frame and event when it is due. now: a monotonic clock, in seconds.
    """

    def __init__(self, on_item: Callable[[Item], None], now: Callable[[], float] = time.monotonic) -> None:
        self._on_item = on_item
        self._now = now
        self._start_s = now()
        self._shift_s: float | None = None  # from the media clock to the local one; None before the first item
        self._items: deque[tuple[float, Item]] = deque()
        self._pcm = bytearray()
        self._pcm_start = 0  # local time of the start of `_pcm`, in samples
        self._changed = asyncio.Event()

    @property
    def elapsed_s(self) -> float:
        """Seconds on the local clock."""
        return self._now() - self._start_s

    async def put(self, item: Item) -> None:
        """Queue an item, once there is room."""
        while len(self._items) >= MAX_QUEUED:
            self._changed.clear()
            await self._changed.wait()
        if isinstance(item, Audio):
            self._add_audio(self._due_s(item.pts_s), item.data)
        elif isinstance(item, Frame):
            self._items.append((self._due_s(item.pts_s), item))
        else:
            self._items.append((0.0, item))  # due with the item before it
        self._changed.set()

    def drop(self) -> None:
        """Drop all queued frames and audio. The last frame stays; the next item is due as soon as it arrives."""
        events = [item for _, item in self._items if not isinstance(item, Frame)]
        self._items.clear()
        self._pcm.clear()
        self._shift_s = None
        self._changed.set()
        for item in events:
            self._on_item(item)

    async def next_frame(self) -> tuple[float, Frame]:
        """Wait for the next frame and return its due time, in seconds on the local clock, and the frame."""
        while True:
            early_s = self._items[0][0] - self.elapsed_s if self._items else None
            if early_s is None or early_s > 0:
                self._changed.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(early_s):
                        await self._changed.wait()
                continue
            due_s, item = self._items.popleft()
            self._changed.set()
            self._on_item(item)
            if isinstance(item, Frame):
                return due_s, item

    def audio(self, start: int) -> bytes:
        """Return `TRACK_SAMPLES` of audio from a sample of the local clock on, with silence where there is none."""
        past = max(0, start - self._pcm_start) * SAMPLE_BYTES
        del self._pcm[:past]
        self._pcm_start = max(self._pcm_start, start) if self._pcm else start
        before = max(0, min(TRACK_SAMPLES, self._pcm_start - start)) * SAMPLE_BYTES
        wanted = TRACK_SAMPLES * SAMPLE_BYTES - before
        available = bytes(self._pcm[:wanted])
        return bytes(before) + available + bytes(wanted - len(available))

    def _due_s(self, pts_s: float) -> float:
        """Return an item's due time on the local clock. A late item shifts all later ones."""
        if self._shift_s is None or pts_s + self._shift_s < self.elapsed_s:
            self._shift_s = self.elapsed_s + MARGIN_S - pts_s
        return pts_s + self._shift_s

    def _add_audio(self, due_s: float, data: bytes) -> None:
        due = round(due_s * RATE_HZ)
        if not self._pcm:
            self._pcm_start = due
        end = self._pcm_start + len(self._pcm) // SAMPLE_BYTES
        self._pcm += bytes(max(0, due - end) * SAMPLE_BYTES) + data


class VideoTrack(MediaStreamTrack):
    """The frames, raw RGB of the session's size."""

    kind = "video"

    def __init__(self, playout: Playout, width: int, height: int) -> None:
        super().__init__()
        self._playout, self._shape = playout, (height, width, 3)

    async def recv(self) -> VideoFrame:
        """Return the next frame when it is due."""
        if self.readyState != "live":
            raise MediaStreamError
        due_s, frame = await self._playout.next_frame()
        picture = VideoFrame.from_ndarray(np.frombuffer(frame.data, np.uint8).reshape(self._shape), "rgb24")
        picture.pts, picture.time_base = round(due_s * CLOCK_HZ), Fraction(1, CLOCK_HZ)
        return picture


class AudioTrack(MediaStreamTrack):
    """The audio, 20 ms every 20 ms, with silence where there is none."""

    kind = "audio"

    def __init__(self, playout: Playout) -> None:
        super().__init__()
        self._playout = playout
        self._next: int | None = None

    async def recv(self) -> AudioFrame:
        """Return the next 20 ms when they are due."""
        if self.readyState != "live":
            raise MediaStreamError
        if self._next is None:
            self._next = round(self._playout.elapsed_s * RATE_HZ)
        start, self._next = self._next, self._next + TRACK_SAMPLES
        await asyncio.sleep(max(0.0, start / RATE_HZ - self._playout.elapsed_s))
        frame = AudioFrame(format="s16", layout="mono", samples=TRACK_SAMPLES)
        frame.planes[0].update(self._playout.audio(start))
        frame.pts, frame.sample_rate, frame.time_base = start, RATE_HZ, Fraction(1, RATE_HZ)
        return frame
