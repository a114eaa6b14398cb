"""Which version of the conditions each block of a session is made under.

Versions are numbered one after another and each holds from a block on. The last level writes the sink's update as the
version after block 0's, while block 0 is on its way; a new prompt is written by the gateway. Both take a number, so a
prompt that comes meanwhile waits, and is added to the new sink.
"""

import asyncio
from collections.abc import Awaitable, Callable

from avatar.errors import SessionClosed


class Versions:
    """The versions of one session's conditions.

    version: what block 0 is made under. sink_update_block: the first block under the sink's update, None for none.
    next_block: index of the next block.
    """

    def __init__(self, version: int, sink_update_block: int | None) -> None:
        self.next_block = 0
        self._sink_update_block = sink_update_block
        # From which block on which version holds.
        self._holds = [(0, version)]
        self._first = version
        self._settled = asyncio.Event()
        self._admitting = asyncio.Lock()
        self._is_over = False

    async def admit(self) -> tuple[int, int]:
        """The next block's index and version. Waits for the sink's update where it is due."""
        if self.next_block == self._sink_update_block:
            await self._settled.wait()
        async with self._admitting:
            index = self.next_block
            version = next(version for first, version in reversed(self._holds) if first <= index)
            if index == 0:
                self._first = version
            self.next_block += 1
            return index, version

    def finished(self, index: int) -> None:
        """A block is denoised. Once block 0 is, the last level has written the sink's update."""
        if index == 0:
            if self._sink_update_block is not None:
                self._holds.append((self._sink_update_block, self._first + 1))
            self._settled.set()

    def end(self) -> None:
        """No block is admitted any more."""
        self._is_over = True
        self._settled.set()

    async def change(self, write: Callable[[int, int], Awaitable[None]]) -> int:
        """Have a version written after the newest; the first block that is made under it.

        write: is given the numbers of the newest version, and of the one to write. SessionClosed if it is too late.
        """
        while True:
            if self._is_sink_awaited():
                await self._settled.wait()
            async with self._admitting:
                if self._is_over:
                    raise SessionClosed("the session's stream has ended; its prompt cannot be changed")
                if self._is_sink_awaited():
                    continue
                first, newest = self._holds[-1]
                await write(newest, newest + 1)
                self._holds.append((max(first, self.next_block), newest + 1))
                return self._holds[-1][0]

    def _is_sink_awaited(self) -> bool:
        return self._sink_update_block is not None and self.next_block > 0 and not self._settled.is_set()
