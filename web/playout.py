"""When frames and sound are shown, and the two WebRTC tracks that show them.

    gateway's items -> Playout -> Picture (video track), Voice (audio track) -> browser

A live gateway sends a block as soon as it is made. Each frame, and the sound that goes with it, is shown at its place
on the session's media clock; what comes later than its place moves everything behind it. Picture and sound are placed
by the same rule on the same clock, so they cannot drift apart.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from fractions import Fraction

import numpy as np
from aiortc import MediaStreamTrack
from aiortc.mediastreams import MediaStreamError
from av import AudioFrame, VideoFrame

from avatar.client import Audio, Frame, Item

RATE_HZ = 24000  # what most synthesisers make; Opus hears no more of a voice
VOICE_SAMPLES = RATE_HZ // 50
SAMPLE_BYTES = 2
# What is placed anew has so long until it is shown, that the next 20 ms of sound are never half there.
MARGIN_S = 0.03
# Items that wait before no more are taken: four blocks, events among them.
MAX_WAITING = 64
CLOCK_HZ = 90000


class Playout:
    """One session's picture and sound in the order and at the time that they are shown.

    told: called with each item that is no sound when its turn has come. now: seconds on a clock that never goes back.
    """

    def __init__(self, told: Callable[[Item], None], now: Callable[[], float] = time.monotonic) -> None:
        self.last: Frame | None = None
        self._told = told
        self._now = now
        self._start_s = now()
        self._shift_s: float | None = None  # from the media clock to ours; None until something is placed
        self._items: deque[tuple[float, Item]] = deque()
        self._pcm = bytearray()
        self._pcm_start = 0  # sample of our clock that `_pcm` begins with
        self._changed = asyncio.Event()

    @property
    def elapsed_s(self) -> float:
        """Seconds on our clock."""
        return self._now() - self._start_s

    async def put(self, item: Item) -> None:
        """Have an item shown in its turn, once there is room."""
        while len(self._items) >= MAX_WAITING:
            self._changed.clear()
            await self._changed.wait()
        if isinstance(item, Audio):
            self._place_sound(self._place(item.pts_s), item.data)
        elif isinstance(item, Frame):
            self._items.append((self._place(item.pts_s), item))
        else:
            self._items.append((0.0, item))  # with what comes before it
        self._changed.set()

    def drop(self) -> None:
        """Show nothing of what waits: the last frame holds, and what comes next is shown when it comes."""
        waiting = [item for _, item in self._items if not isinstance(item, Frame)]
        self._items.clear()
        self._pcm.clear()
        self._shift_s = None
        self._changed.set()
        for item in waiting:
            self._told(item)

    async def next_frame(self) -> tuple[float, Frame]:
        """The next frame, when it is due, and its time on our clock in seconds."""
        while True:
            if not self._items:
                self._changed.clear()
                await self._changed.wait()
            elif (early_s := self._items[0][0] - self.elapsed_s) > 0:
                self._changed.clear()
                try:
                    async with asyncio.timeout(early_s):
                        await self._changed.wait()
                except TimeoutError:
                    pass
            else:
                due_s, item = self._items.popleft()
                self._changed.set()
                self._told(item)
                if isinstance(item, Frame):
                    self.last = item
                    return due_s, item

    def sound(self, start: int) -> bytes:
        """The sound of the next `VOICE_SAMPLES` from a sample of our clock on; silence where there is none."""
        past = max(0, start - self._pcm_start) * SAMPLE_BYTES
        del self._pcm[:past]
        self._pcm_start = max(self._pcm_start, start) if self._pcm else start
        before = max(0, min(VOICE_SAMPLES, self._pcm_start - start)) * SAMPLE_BYTES
        wanted = VOICE_SAMPLES * SAMPLE_BYTES - before
        taken = bytes(self._pcm[:wanted])
        return bytes(before) + taken + bytes(wanted - len(taken))

    def _place(self, pts_s: float) -> float:
        """When something is shown on our clock; from now on everything is that late, if it comes late."""
        if self._shift_s is None or pts_s + self._shift_s < self.elapsed_s:
            self._shift_s = self.elapsed_s + MARGIN_S - pts_s
        return pts_s + self._shift_s

    def _place_sound(self, due_s: float, data: bytes) -> None:
        due = round(due_s * RATE_HZ)
        if not self._pcm:
            self._pcm_start = due
        end = self._pcm_start + len(self._pcm) // SAMPLE_BYTES
        self._pcm += bytes(max(0, due - end) * SAMPLE_BYTES) + data


class Picture(MediaStreamTrack):
    """The frames as a video track. They are raw RGB of the session's size."""

    kind = "video"

    def __init__(self, playout: Playout, width: int, height: int) -> None:
        super().__init__()
        self._playout, self._shape = playout, (height, width, 3)

    async def recv(self) -> VideoFrame:
        """The next frame, when it is due."""
        if self.readyState != "live":
            raise MediaStreamError
        due_s, frame = await self._playout.next_frame()
        picture = VideoFrame.from_ndarray(np.frombuffer(frame.data, np.uint8).reshape(self._shape), "rgb24")
        picture.pts, picture.time_base = round(due_s * CLOCK_HZ), Fraction(1, CLOCK_HZ)
        return picture


class Voice(MediaStreamTrack):
    """The sound as an audio track: 20 ms every 20 ms, silence where there is none."""

    kind = "audio"

    def __init__(self, playout: Playout) -> None:
        super().__init__()
        self._playout = playout
        self._next: int | None = None

    async def recv(self) -> AudioFrame:
        """The next 20 ms, when they are due."""
        if self.readyState != "live":
            raise MediaStreamError
        if self._next is None:
            self._next = round(self._playout.elapsed_s * RATE_HZ)
        start, self._next = self._next, self._next + VOICE_SAMPLES
        await asyncio.sleep(max(0.0, start / RATE_HZ - self._playout.elapsed_s))
        frame = AudioFrame(format="s16", layout="mono", samples=VOICE_SAMPLES)
        frame.planes[0].update(self._playout.sound(start))
        frame.pts, frame.sample_rate, frame.time_base = start, RATE_HZ, Fraction(1, RATE_HZ)
        return frame
