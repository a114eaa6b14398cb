"""Which version of the conditions each block of a session is made under.

Versions are numbered one after another and each holds from a block on. The last level writes the sink's update as the
version after block 0's, while block 0 is on its way; a new prompt is written by the gateway. Both take a number, so a
prompt that comes meanwhile waits, and is added to the new sink.
"""

import asyncio
from collections.abc import Awaitable, Callable

from avatar.errors import SessionClosed
from avatar.worker.v1 import types_pb2


class Versions:
    """The versions of one session's conditions.

    position: where the session begins, or goes on. conditions: the version that its next block is made under.
    sink_update_block: the first block under the sink's update, None for none.
    next_block: index of the next block.
    """

    def __init__(
        self, position: types_pb2.Position, conditions: types_pb2.Conditions, sink_update_block: int | None
    ) -> None:
        self.next_block = position.next_block
        self._sink_update_block = sink_update_block
        # From which block on which version holds.
        self._holds = [(self.next_block, position.conditions)]
        if position.coming_conditions:
            self._holds.append((position.coming_block, position.coming_conditions))
        self._first = position.conditions
        self._settled = asyncio.Event()
        if self.next_block:
            self._settled.set()
        self._changing = asyncio.Lock()
        self._is_over = False
        # What is carried to the levels with the first block of a version.
        self._known = {conditions.version: conditions}
        self._admitted: int | None = None

    async def admit(self, block: types_pb2.Block) -> None:
        """Number a block, and say which version it is made under. Waits for the sink's update where it is due."""
        if self.next_block == self._sink_update_block:
            await self._settled.wait()
        if self.next_block:
            self._number(block)
            return
        async with self._changing:  # the sink's update is the version after block 0's
            self._number(block)
            self._first = block.conditions

    def _number(self, block: types_pb2.Block) -> None:
        block.index = self.next_block
        block.conditions = self._version_at(self.next_block)
        if block.conditions != self._admitted:
            if (carried := self._known.get(block.conditions)) is not None:
                block.carried.CopyFrom(carried)
            self._admitted = block.conditions
        self.next_block += 1

    @property
    def kept(self) -> list[types_pb2.Conditions]:
        """The versions that streams may ask the store for, the newest last."""
        return [self._known[version] for version in sorted(self._known)]

    def keep(self, conditions: types_pb2.Conditions) -> None:
        """Have a version carried to the levels, so that they need not ask the store."""
        self._known[conditions.version] = conditions

    def note(self, position: types_pb2.Position) -> None:
        """Write which versions hold from the position's next block on; older ones are forgotten."""
        position.conditions = self._version_at(position.next_block)
        self._holds = [each for each in self._holds if each[1] >= position.conditions]
        # Streams that are rebuilt begin a window before, which may be under the version before.
        self._known = {version: each for version, each in self._known.items() if version >= position.conditions - 1}
        coming, version = self._holds[-1]
        is_coming = coming > position.next_block
        position.coming_block, position.coming_conditions = (coming, version) if is_coming else (0, 0)

    def _version_at(self, index: int) -> int:
        return next(version for first, version in reversed(self._holds) if first <= index)

    def finished(self, index: int) -> None:
        """A block is denoised. Once block 0 is, the last level has made the sink's update."""
        if index == 0:
            if self._sink_update_block is not None:
                self._holds.append((self._sink_update_block, self._first + 1))
            self._settled.set()

    def end(self) -> None:
        """No block is admitted any more."""
        self._is_over = True
        self._settled.set()

    async def change(self, write: Callable[[int, int], Awaitable[types_pb2.Conditions]]) -> int:
        """Have a version written after the newest; the first block that is made under it.

        write: is given the numbers of the newest version, and of the one to write, and returns that. SessionClosed if
        it is too late.
        """
        while True:
            if self._is_sink_awaited():
                await self._settled.wait()
            async with self._changing:
                if self._is_over:
                    raise SessionClosed("the session's stream has ended; its prompt cannot be changed")
                if self._is_sink_awaited():
                    continue
                first, newest = self._holds[-1]
                self.keep(await write(newest, newest + 1))
                self._holds.append((max(first, self.next_block), newest + 1))
                return self._holds[-1][0]

    def _is_sink_awaited(self) -> bool:
        return self._sink_update_block is not None and self.next_block > 0 and not self._settled.is_set()
