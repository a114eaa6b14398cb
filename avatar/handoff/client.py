"""The levels of a chain as one stage. Works on messages and never opens a tensor."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import grpc.aio

from avatar.pipeline import beside
from avatar.rpc.client import remote_denoiser
from avatar.worker.v1 import denoiser_pb2 as pb
from avatar.worker.v1.types_pb2 import Block


class RemoteChain:
    """One session's streams at all levels of a chain: open them, then call it with the blocks.

    levels: the streams, from level 0; each says at its end what it has cost.
    """

    def __init__(self, channels: Sequence[grpc.aio.Channel]) -> None:
        """channels: of each level's worker; one that serves several is given for each."""
        self.levels = [remote_denoiser(channel, level) for level, channel in enumerate(channels)]

    async def open(self, session_id: str, **fields: Any) -> list[pb.DenoiseOpened]:
        """Open the streams at once; what each level answers. Raises what a worker says, or StageLost.

        fields: of OpenDenoise, the same at all levels.
        """
        handoff = secrets.randbelow(2**63 - 1) + 1
        opens = [
            pb.OpenDenoise(session_id=session_id, level=level, handoff=handoff, **fields)
            for level in range(len(self.levels))
        ]
        try:
            async with asyncio.TaskGroup() as tasks:
                opening = [tasks.create_task(stage.open(each)) for stage, each in zip(self.levels, opens, strict=True)]
        except BaseException as error:
            self.cancel()
            raise _first(error) from None
        return [each.result() for each in opening]

    async def __call__(self, blocks: AsyncGenerator[Block, None]) -> AsyncGenerator[Block, None]:
        """The last level's answers to blocks without latents.

        A block goes to all levels at once, and one more than there are levels at a time. What fails first, the blocks
        or a level, is what is raised.
        """
        ways: list[asyncio.Queue[Block | None]] = [asyncio.Queue() for _ in self.levels]
        answers: asyncio.Queue[Block | None] = asyncio.Queue()
        room = asyncio.Semaphore(len(self.levels))

        async def share() -> None:
            async with aclosing(blocks):
                async for block in blocks:
                    for way in ways:
                        way.put_nowait(block)
                    await room.acquire()
            for way in ways:
                way.put_nowait(None)

        async def work_at(level: int) -> None:
            async with aclosing(self.levels[level](_waiting(ways[level]))) as answered:
                async for answer in answered:
                    if level == len(self.levels) - 1:
                        answers.put_nowait(answer)

        async def work() -> None:
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(share())
                    for level in range(len(self.levels)):
                        tasks.create_task(work_at(level))
            finally:
                answers.put_nowait(None)

        async with beside(work()) as working:
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
        for stage in self.levels:
            stage.cancel()


async def _waiting(items: asyncio.Queue[Block | None]) -> AsyncGenerator[Block, None]:
    while (item := await items.get()) is not None:
        yield item


def _first(error: BaseException) -> BaseException:
    """What failed first of a task group; the others failed because it did."""
    return error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error
