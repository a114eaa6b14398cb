"""Speech that waits for a browser session's stream: audio, texts and ends of turns, all of them bounded."""

import asyncio
from collections import deque

from web.playout import RATE_HZ, SAMPLE_BYTES

# Texts, turns, and stretches of audio that may wait.
MAX_ITEMS = 512
# Short pieces of audio are joined up to this size, so that the number of items follows from the amount of audio.
JOINED_BYTES = 16_000


class PendingSpeech:
    """Audio, texts, and ends of turns (None) that wait for the stream, in order. max_s: of audio."""

    def __init__(self, max_s: float) -> None:
        self._max_s = max_s
        self._items: deque[bytearray | str | None] = deque()
        self._num_bytes = 0
        self._added = asyncio.Event()

    @property
    def seconds(self) -> float:
        """Amount of pending audio."""
        return self._num_bytes / SAMPLE_BYTES / RATE_HZ

    @property
    def is_full(self) -> bool:
        """True if audio and texts must be refused. The turn that is open may still end."""
        return self.seconds > self._max_s or len(self._items) >= MAX_ITEMS

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: bytes | str | None) -> None:
        """Append an item; join audio with the audio before it."""
        last = self._items[-1] if self._items else None
        if isinstance(item, bytes):
            self._num_bytes += len(item)
            if isinstance(last, bytearray) and len(last) + len(item) <= JOINED_BYTES:
                last += item
                return
        self._items.append(bytearray(item) if isinstance(item, bytes) else item)
        self._added.set()

    async def get(self) -> bytes | str | None:
        """Wait for the next item and remove it."""
        while not self._items:
            self._added.clear()
            await self._added.wait()
        item = self._items.popleft()
        if not isinstance(item, bytearray):
            return item
        self._num_bytes -= len(item)
        return bytes(item)

    def clear(self) -> None:
        """Drop all items."""
        self._items.clear()
        self._num_bytes = 0
