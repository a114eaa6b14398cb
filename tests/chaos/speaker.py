"""A session that speaks, and what has come of it."""

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
from avatar.types import BLOCK_FRAMES

FIRST_FRAME = 3
WAIT_S, RETRY_S = 60.0, 1.0


@dataclass(frozen=True)
class Seen:
    """One frame, and when it came on the monotonic clock."""

    index: int
    data: bytes
    is_discontinuity: bool
    came_s: float


class Speaker:
    """One session's stream. Made by `speaking`."""

    def __init__(self, session_id: str, stream: Stream) -> None:
        self.session_id = session_id
        self.seen: list[Seen] = []
        self.failure: AvatarError | None = None
        self._stream = stream
        self._changed = asyncio.Event()
        self._has_ended = asyncio.Event()

    @property
    def pixels(self) -> list[bytes]:
        return [frame.data for frame in self.seen]

    @property
    def num_lost(self) -> int:
        """Numbers that were left out."""
        indexes = [FIRST_FRAME - 1, *(frame.index for frame in self.seen)]
        return sum(max(0, after - before - 1) for before, after in pairwise(indexes))

    @property
    def num_doubled(self) -> int:
        """Numbers that came again."""
        return len(self.seen) - len({frame.index for frame in self.seen})

    @property
    def jumps(self) -> list[Seen]:
        """The frames that are flagged."""
        return [frame for frame in self.seen if frame.is_discontinuity]

    def recovered_s(self, since_s: float) -> float | None:
        """Seconds from a time to the next flagged frame, None if none came."""
        return next((frame.came_s - since_s for frame in self.jumps if frame.came_s > since_s), None)

    async def say(self, data: bytes) -> None:
        """Send sound."""
        await self._stream.push(data)

    async def until(self, num_frames: int) -> None:
        """Wait for so many frames. Raises what ended the stream before."""
        async with asyncio.timeout(WAIT_S):
            while len(self.seen) < num_frames and not self._has_ended.is_set():
                self._changed.clear()
                await self._changed.wait()
        if self.failure:
            raise self.failure

    async def finish(self) -> None:
        """Close and wait for all frames. Raises what ended the stream before."""
        async with asyncio.timeout(WAIT_S):
            await self._stream.close()
            await self._has_ended.wait()
        if self.failure:
            raise self.failure

    async def watch(self) -> None:
        """Note what comes."""
        try:
            async for frame in self._stream.frames():
                self.seen.append(Seen(frame.index, frame.data, frame.is_discontinuity, time.monotonic()))
                self._changed.set()
        except AvatarError as error:
            self.failure = error
        finally:
            self._has_ended.set()
            self._changed.set()


@asynccontextmanager
async def speaking(target: str, picture: bytes, *, seed: int, live: bool = False) -> AsyncGenerator[Speaker, None]:
    """A session while the body runs, which says what and finishes; it is deleted in the end."""
    async with connect(target) as avatar:
        session = await avatar.create(picture, seed=seed)
        try:
            async with session.stream(live=live) as stream:
                speaker = Speaker(session.id, stream)
                async with background(speaker.watch()):
                    yield speaker
        finally:
            await _forget(session)


async def _forget(session: Session) -> None:
    """Delete a session, however long it takes until somebody is there to do that."""
    async with asyncio.timeout(WAIT_S):
        with suppress(SessionNotFound):
            while True:
                try:
                    return await session.delete(timeout_s=RETRY_S)
                except (ConnectionLost, StoreUnavailable):
                    await asyncio.sleep(RETRY_S)


def num_frames(num_blocks: int) -> int:
    """Frames of so many blocks: the decoder's start is not shown."""
    return num_blocks * BLOCK_FRAMES - FIRST_FRAME


def distance(pixels: list[bytes], expected: list[bytes]) -> float:
    """Root of the mean square of what frames differ by, over the deviation of those that are expected."""
    a, b = _tensor(pixels), _tensor(expected)
    return float((a - b).square().mean().sqrt() / b.std())


def _tensor(frames: list[bytes]) -> Tensor:
    return torch.stack([torch.frombuffer(bytearray(frame), dtype=torch.uint8) for frame in frames]).float()
