"""The version of the conditions that each block of a session is made under.

Versions are numbered, and each applies from one block on. The result of block 0 becomes the sink of the version after
block 0's, which the last level writes; the gateway writes a version for each new prompt. A prompt that comes between
block 0 and the sink's update waits for it, and is combined with the new sink.

A version reaches the levels as soon as it is known, so that they prefill it ahead, and again with the first block that
is made under it. The next one takes over once that block has passed all levels: levels of one process share a prefill,
and with two versions between them each would replace the other's.
"""

import asyncio
from collections.abc import Awaitable, Callable

from avatar.errors import SessionClosed
from avatar.worker.v1 import types_pb2


class ConditionVersions:
    """The versions of one session's conditions.

    position: where the session starts or resumes. conditions: the version that its next block is made under.
    sink_update_block: the first block made under the sink's update; None if the picture stays the sink.
    max_blocks: blocks that are admitted and not denoised, at most.
    next_block: index of the next block to admit. on_added: called with each version that is added.
    """

    def __init__(
        self,
        position: types_pb2.Position,
        conditions: types_pb2.Conditions,
        sink_update_block: int | None,
        max_blocks: int,
    ) -> None:
        self.next_block = position.next_block
        self.on_added: Callable[[types_pb2.Conditions], None] = lambda _: None
        self._sink_update_block, self._max_blocks = sink_update_block, max_blocks
        self._num_denoised = position.next_block
        # (first block, version), ascending.
        self._in_force = [(self.next_block, position.conditions)]
        if position.coming_conditions:
            self._in_force.append((position.coming_block, position.coming_conditions))
        self._first_version = position.conditions
        self._sink_is_written = asyncio.Event()  # or there is none to wait for
        if self.next_block:
            self._sink_is_written.set()
        self._changing = asyncio.Lock()
        self._is_closed = False
        self._known = {conditions.version: conditions}
        self._last_admitted: int | None = None

    async def admit(self, block: types_pb2.Block) -> None:
        """Number a block and set its version, after the sink's update if the block depends on it."""
        if self.next_block == self._sink_update_block:
            await self._sink_is_written.wait()
        if self.next_block:
            self._number(block)
            return
        async with self._changing:  # the version after block 0's belongs to the sink's update
            self._number(block)
            self._first_version = block.conditions

    def _number(self, block: types_pb2.Block) -> None:
        block.index = self.next_block
        block.conditions = self._version_at(self.next_block)
        if block.conditions != self._last_admitted:
            block.carried.CopyFrom(self._known[block.conditions])
            self._last_admitted = block.conditions
        self.next_block += 1

    @property
    def known(self) -> list[types_pb2.Conditions]:
        """The versions in use, the newest last: what a store that lost the session needs."""
        return [self._known[version] for version in sorted(self._known)]

    def add(self, conditions: types_pb2.Conditions) -> None:
        """Add a version that is, or will be, in force."""
        self._known[conditions.version] = conditions
        self.on_added(conditions)

    def record(self, position: types_pb2.Position) -> None:
        """Write into the position which versions are in force from its next block on, and forget older ones."""
        position.conditions = self._version_at(position.next_block)
        self._in_force = [each for each in self._in_force if each[1] >= position.conditions]
        self._known = {version: each for version, each in self._known.items() if version >= position.conditions}
        first_block, version = self._in_force[-1]
        is_coming = first_block > position.next_block
        position.coming_block, position.coming_conditions = (first_block, version) if is_coming else (0, 0)

    def _version_at(self, index: int) -> int:
        for first_block, version in reversed(self._in_force):
            if first_block <= index:
                return version
        raise AssertionError("the versions in force start at the position's next block")

    def finish(self, index: int) -> None:
        """Record that a block is denoised, in order. Once block 0 is, the last level has written the sink's update."""
        self._num_denoised = index + 1
        if index == 0:
            if self._sink_update_block is not None:
                self._in_force.append((self._sink_update_block, self._first_version + 1))
            self._sink_is_written.set()

    def close(self) -> None:
        """Refuse changes from now on: no more blocks are admitted."""
        self._is_closed = True
        self._sink_is_written.set()

    async def change(self, write: Callable[[int, int], Awaitable[types_pb2.Conditions]]) -> int:
        """Put a new version in force, at the next block that can be, and return the first block made under it.

        write: writes the new version, given the numbers of the newest version and of the new one, and returns it. Both
        are the same if no block was made under the newest version: it is replaced, so that of any number of changes
        ahead of its first block the last one counts. SessionClosed if the stream has ended.
        """
        while True:
            if self._is_sink_awaited():
                await self._sink_is_written.wait()
            async with self._changing:
                if self._is_closed:
                    raise SessionClosed("the session's stream has ended; its prompt cannot be changed")
                if self._is_sink_awaited():
                    continue
                first_block, newest = self._in_force[-1]
                if self.next_block > first_block:
                    self.add(await write(newest, newest + 1))
                    has_passed = first_block < self._num_denoised
                    changed_block = max(self.next_block, 0 if has_passed else first_block + self._max_blocks)
                    self._in_force.append((changed_block, newest + 1))
                    return changed_block
                replaced = await write(newest, newest)
                if self.next_block <= first_block:  # no block was admitted in the meantime
                    self.add(replaced)
                    return first_block

    def _is_sink_awaited(self) -> bool:
        return self._sink_update_block is not None and self.next_block > 0 and not self._sink_is_written.is_set()
