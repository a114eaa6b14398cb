"""The levels of a chain as one stage. Works on messages and never opens a tensor."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

import grpc.aio

from avatar.aio import background
from avatar.rpc.client import Relayable, remote_denoiser
from avatar.rpc.status import root_cause
from avatar.rpc.wire import Parts, RelayedBlock
from avatar.worker.v1 import denoiser_pb2 as pb
from avatar.worker.v1 import types_pb2
from avatar.worker.v1.types_pb2 import Closed

Queued = TypeVar("Queued")


class RemoteChain:
    """One session's streams at all levels of a chain: open them, then call it with the blocks.

    Every level receives a block's slack as that of the whole chain.
    """

    def __init__(self, channels: Sequence[grpc.aio.Channel]) -> None:
        """channels: to the worker of each level, from level 0; one that serves several levels occurs several times."""
        self._levels = [remote_denoiser(channel, level) for level, channel in enumerate(channels)]

    @property
    def closed(self) -> Closed:
        """Blocks of the chain, and the compute time of all levels, once the streams have ended."""
        busy_s = sum(each.closed.busy_s for each in self._levels)
        return Closed(num_blocks=self._levels[-1].closed.num_blocks, busy_s=busy_s)

    async def open(self, message: pb.OpenDenoise, session: Parts = ()) -> pb.DenoiseOpened:
        """Open the streams at once; return the last level's `opened`. Raises a worker's error, or StageLost.

        message: the same for all levels, without `level` and `handoff`; its `max_active` is a bound on the streams of
        level 0's worker, which stands for the chain. session: as of `RemoteStage.open`.
        """
        handoff = secrets.randbelow(2**63 - 1) + 1
        try:
            async with asyncio.TaskGroup() as tasks:
                for level, stage in enumerate(self._levels):
                    level_message = pb.OpenDenoise(level=level, handoff=handoff)
                    level_message.MergeFrom(message)
                    if level:
                        level_message.ClearField("max_active")
                    opening = tasks.create_task(stage.open(level_message, session))
        except BaseException as error:
            self.cancel()
            raise root_cause(error) from None
        opened: pb.DenoiseOpened = opening.result()
        return opened

    async def __call__(self, blocks: AsyncGenerator[Relayable, None]) -> AsyncGenerator[RelayedBlock, None]:
        """Yield the last level's answers to blocks without latents.

        A block goes to all levels at once, and one block more than there are levels is in flight. Raises the first
        error of the blocks or of a level.
        """
        queues: list[asyncio.Queue[Relayable | None]] = [asyncio.Queue() for _ in self._levels]
        answers: asyncio.Queue[RelayedBlock | None] = asyncio.Queue()
        slots = asyncio.Semaphore(len(self._levels))

        async def distribute() -> None:
            async with aclosing(blocks):
                async for block in blocks:
                    for each in queues:
                        each.put_nowait(block)
                    if not isinstance(block, types_pb2.Conditions):  # which are not answered
                        await slots.acquire()
            for each in queues:
                each.put_nowait(None)

        async def run_level(level: int) -> None:
            async with aclosing(self._levels[level](_until_none(queues[level]))) as level_answers:
                async for answer in level_answers:
                    if level == len(self._levels) - 1:
                        answers.put_nowait(answer)

        async def run() -> None:
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(distribute())
                    for level in range(len(self._levels)):
                        tasks.create_task(run_level(level))
            finally:
                answers.put_nowait(None)

        async with background(run()) as running:
            async with aclosing(_until_none(answers)) as last_answers:
                async for answer in last_answers:
                    slots.release()
                    yield answer
            try:
                await running
            except BaseExceptionGroup as error:
                raise root_cause(error) from None

    def cancel(self) -> None:
        """End the streams at once; does nothing if they have ended."""
        for stage in self._levels:
            stage.cancel()


async def _until_none(items: asyncio.Queue[Queued | None]) -> AsyncGenerator[Queued, None]:
    while (item := await items.get()) is not None:
        yield item
