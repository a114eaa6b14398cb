"""A session that streams speech, and a record of the frames that it receives."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from avatar.aio import background
from avatar.client import Session, connect
from avatar.client.stream import Stream
from avatar.errors import AvatarError, ConnectionLost, SessionNotFound, StoreUnavailable
from tests.blocks import BLOCK_FRAMES, FIRST_FRAME

WAIT_S, RETRY_S = 60.0, 1.0


@dataclass(frozen=True)
class Received:
    """One frame, and the monotonic time at which it arrived."""

    index: int
    data: bytes
    is_discontinuity: bool
    time_s: float


class Speaker:
    """One session's stream. Opened by `speaking`."""

    def __init__(self, session_id: str, stream: Stream) -> None:
        self.session_id = session_id
        self.received: list[Received] = []
        self.failure: AvatarError | None = None
        self._stream = stream
        self._changed = asyncio.Event()
        self._has_ended = asyncio.Event()

    @property
    def pixels(self) -> list[bytes]:
        return [frame.data for frame in self.received]

    @property
    def num_lost(self) -> int:
        """Frames that are missing between the first and the last."""
        indexes = [FIRST_FRAME - 1, *(frame.index for frame in self.received)]
        return sum(max(0, after - before - 1) for before, after in pairwise(indexes))

    @property
    def num_repeated(self) -> int:
        """Frames that arrived again."""
        return len(self.received) - len({frame.index for frame in self.received})

    @property
    def jumps(self) -> list[Received]:
        """Frames that are marked as discontinuities."""
        return [frame for frame in self.received if frame.is_discontinuity]

    def recovery_s(self, since_s: float) -> float | None:
        """Return the seconds from a time to the next discontinuity, None if there was none."""
        return next((frame.time_s - since_s for frame in self.jumps if frame.time_s > since_s), None)

    def longest_pause_s(self, start_s: float, end_s: float) -> float:
        """Return the longest time between two frames that a time span, on the monotonic clock, has a part of; or 0."""
        times = [frame.time_s for frame in self.received]
        return max((b - a for a, b in pairwise(times) if b > start_s and a < end_s), default=0.0)

    async def say(self, speech: bytes | str) -> None:
        """Send audio or text."""
        if isinstance(speech, str):
            await self._stream.say(speech)
        else:
            await self._stream.push(speech)

    async def listen(self, data: bytes) -> None:
        """Send audio of the other person."""
        await self._stream.listen(data)

    async def until(self, num_frames: int) -> None:
        """Wait for so many frames. Raises the error that ends the stream before."""
        async with asyncio.timeout(WAIT_S):
            while len(self.received) < num_frames and not self._has_ended.is_set():
                self._changed.clear()
                await self._changed.wait()
        if self.failure:
            raise self.failure

    async def finish(self) -> None:
        """Close and wait for all frames. Raises the error that ends the stream before."""
        async with asyncio.timeout(WAIT_S):
            await self._stream.close()
            await self._has_ended.wait()
        if self.failure:
            raise self.failure

    async def receive(self) -> None:
        """Record frames until the stream ends."""
        try:
            async for frame in self._stream.frames():
                self.received.append(Received(frame.index, frame.data, frame.is_discontinuity, time.monotonic()))
                self._changed.set()
        except AvatarError as error:
            self.failure = error
        finally:
            self._has_ended.set()
            self._changed.set()


@asynccontextmanager
async def speaking(target: str, picture: bytes, *, seed: int, live: bool = False) -> AsyncGenerator[Speaker, None]:
    """Open a session's stream while the body runs, which sends audio and finishes; then delete the session."""
    async with connect(target) as avatar:
        session = await avatar.create(picture, seed=seed)
        try:
            async with session.stream(live=live) as stream:
                speaker = Speaker(session.id, stream)
                async with background(speaker.receive()):
                    yield speaker
        finally:
            await _delete(session)


async def _delete(session: Session) -> None:
    """Delete a session, and retry until a gateway and the store answer."""
    async with asyncio.timeout(WAIT_S):
        with suppress(SessionNotFound):
            while True:
                try:
                    return await session.delete(timeout_s=RETRY_S)
                except (ConnectionLost, StoreUnavailable):
                    await asyncio.sleep(RETRY_S)


def num_frames(num_blocks: int) -> int:
    """Return the frames of so many blocks; the decoder's first three are not sent."""
    return num_blocks * BLOCK_FRAMES - FIRST_FRAME


def distance(pixels: list[bytes], expected: list[bytes]) -> float:
    """Return the RMS difference of frames, relative to the standard deviation of the expected ones."""
    a, b = _tensor(pixels), _tensor(expected)
    return float((a - b).square().mean().sqrt() / b.std())


def _tensor(frames: list[bytes]) -> Tensor:
    return torch.stack([torch.frombuffer(bytearray(frame), dtype=torch.uint8) for frame in frames]).float()
