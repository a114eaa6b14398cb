"""The levels of a chain as one stage. Works on messages and never opens a tensor."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

import grpc.aio

from avatar.aio import background
from avatar.rpc.client import Relayable, remote_denoiser
from avatar.worker.v1 import denoiser_pb2 as pb
from avatar.worker.v1.types_pb2 import Block, Closed

Queued = TypeVar("Queued")


class RemoteChain:
    """One session's streams at all levels of a chain: open them, then call it with the blocks.

    A block's slack is the whole chain's at every level.
    """

    def __init__(self, channels: Sequence[grpc.aio.Channel]) -> None:
        """channels: of each level's worker, from level 0; one that serves several is given for each."""
        self._levels = [remote_denoiser(channel, level) for level, channel in enumerate(channels)]

    @property
    def closed(self) -> Closed:
        """What the levels said at their end: blocks of the chain, and the time of all."""
        busy_s = sum(each.closed.busy_s for each in self._levels)
        return Closed(num_blocks=self._levels[-1].closed.num_blocks, busy_s=busy_s)

    async def open(self, message: pb.OpenDenoise) -> pb.DenoiseOpened:
        """Open the streams at once; what the last level answers. Raises what a worker says, or StageLost.

        message: the same for all levels, without the level and the name that latents are handed over under.
        """
        handoff = secrets.randbelow(2**63 - 1) + 1
        try:
            async with asyncio.TaskGroup() as tasks:
                for level, stage in enumerate(self._levels):
                    level_message = pb.OpenDenoise(level=level, handoff=handoff)
                    level_message.MergeFrom(message)
                    opening = tasks.create_task(stage.open(level_message))
        except BaseException as error:
            self.cancel()
            raise _first(error) from None
        opened: pb.DenoiseOpened = opening.result()
        return opened

    async def __call__(self, blocks: AsyncGenerator[Relayable, None]) -> AsyncGenerator[Block, None]:
        """The last level's answers to blocks without latents.

        A block goes to all levels at once, and one more than there are levels at a time. What fails first, the blocks
        or a level, is what is raised.
        """
        ways: list[asyncio.Queue[Relayable | None]] = [asyncio.Queue() for _ in self._levels]
        answers: asyncio.Queue[Block | None] = asyncio.Queue()
        room = asyncio.Semaphore(len(self._levels))

        async def share() -> None:
            async with aclosing(blocks):
                async for block in blocks:
                    for way in ways:
                        way.put_nowait(block)
                    await room.acquire()
            for way in ways:
                way.put_nowait(None)

        async def work_at(level: int) -> None:
            async with aclosing(self._levels[level](_waiting(ways[level]))) as answered:
                async for answer in answered:
                    if level == len(self._levels) - 1:
                        answers.put_nowait(answer)

        async def work() -> None:
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(share())
                    for level in range(len(self._levels)):
                        tasks.create_task(work_at(level))
            finally:
                answers.put_nowait(None)

        async with background(work()) as working:
            async with aclosing(_waiting(answers)) as made:
                async for answer in made:
                    room.release()
                    yield answer
            try:
                await working
            except BaseExceptionGroup as error:
                raise _first(error) from None

    def cancel(self) -> None:
        """End the streams at once; nothing happens if they have ended."""
        for stage in self._levels:
            stage.cancel()


async def _waiting(items: asyncio.Queue[Queued | None]) -> AsyncGenerator[Queued, None]:
    while (item := await items.get()) is not None:
        yield item


def _first(error: BaseException) -> BaseException:
    """What failed first of a task group; the others failed because it did."""
    return error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error
