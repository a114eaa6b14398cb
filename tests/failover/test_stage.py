"""Tests of avatar.failover.stage, over workers that answer, hang or fail as a test tells them."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import pytest

from avatar.errors import InvalidAudio, NoCapacity, StageFailed, StageLost
from avatar.failover.connector import StageConnector
from avatar.failover.stage import FailoverStage, FailoverTimeouts
from avatar.rpc.client import remote_audio
from avatar.rpc.interceptor import Context, parts, receive_open
from avatar.rpc.wire import RelayedBlock
from avatar.worker.v1 import audio_pb2 as pb
from avatar.worker.v1.types_pb2 import Closed, Conditions
from tests.failover.test_pool import pooled, workers
from tests.rpc.conftest import OPENED, Requests, Responses, Source, Worker, block, numbered

PATIENT = FailoverTimeouts(stall_s=60.0, rebuild_s=20.0)
IMPATIENT = FailoverTimeouts(stall_s=0.3, rebuild_s=20.0)
Stage = FailoverStage[pb.AudioPiece, RelayedBlock]


class NumberedReplay:
    """The replay of `numbered`'s streams: a piece is answered with the block whose number it holds."""

    def __init__(self) -> None:
        self.kept: list[pb.AudioPiece] = []
        self.next_block = 0

    @property
    def is_answer_due(self) -> bool:
        return bool(self.kept) and int(self.kept[-1].data) >= self.next_block

    def set_window(self, opened: pb.EncodeOpened) -> None:
        pass

    def set_start(self, message: pb.OpenEncode) -> None:
        pass

    def record(self, item: pb.AudioPiece) -> None:
        self.kept.append(item)

    def items(self) -> list[pb.AudioPiece]:
        return self.kept

    def clear(self) -> None:
        self.kept.clear()

    def accept(self, answer: RelayedBlock) -> int | None:
        if answer.index < self.next_block:
            return None
        self.next_block = answer.index + 1
        return answer.index


@asynccontextmanager
async def opened_stage(found: list[Worker], timeouts: FailoverTimeouts = PATIENT) -> AsyncGenerator[Stage, None]:
    """A stage whose stream is open at the first of these workers that takes it."""
    async with pooled(*found) as pool:
        message, replay = pb.OpenEncode(session_id="a"), NumberedReplay()
        connector = StageConnector(
            "audio", pool, replay, message, lambda worker: remote_audio(worker.channel), lambda _: True
        )
        stage = FailoverStage(connector, timeouts)
        await stage.open()
        yield stage
        stage.cancel()


async def all_of(stage: Stage, source: Source) -> list[int]:
    return [each.index async for each in stage(source.stream())]


def breaking(after: int, error: Exception) -> Callable[[Requests, Context], Responses]:
    """Return the behaviour of a worker that answers so many pieces and then fails."""

    async def encode(requests: Requests, _: Context) -> Responses:
        await receive_open(requests)
        yield OPENED
        count = 0
        async for each in parts(requests, "piece"):
            if count == after:
                raise error
            count += 1
            yield block(int(each.data))

    return encode


async def hanging(requests: Requests, _: Context) -> Responses:
    """A worker that answers one piece and then hangs."""
    await receive_open(requests)
    yield OPENED
    async for each in parts(requests, "piece"):
        yield block(int(each.data))
        await asyncio.Event().wait()


async def test_answers_continue_without_a_gap_or_a_repeat() -> None:
    async with workers(2) as found:
        found[0].encode = breaking(3, StageFailed("its device is gone"))
        async with opened_stage(found) as stage:
            rebuilt: list[int] = []
            stage.on_rebuilt = rebuilt.append
            assert await all_of(stage, Source(range(10))) == list(range(10))
            assert rebuilt == [3]
            assert stage.closed == Closed(num_blocks=10, busy_s=0.25)


async def test_a_worker_that_does_not_answer_in_time_is_replaced() -> None:
    async with workers(2) as found:
        found[0].encode = hanging
        async with opened_stage(found, IMPATIENT) as stage:
            assert await all_of(stage, Source(range(5))) == list(range(5))


async def test_a_streams_first_answer_may_take_longer_than_others() -> None:
    opened = 0

    async def slow_at_first(requests: Requests, context: Context) -> Responses:
        nonlocal opened
        opened += 1
        async for each in numbered(requests, context):
            if each.HasField("block") and each.block.index == 0:
                await asyncio.sleep(3 * IMPATIENT.stall_s)
            yield each

    async with workers(1) as found:
        found[0].encode = slow_at_first
        async with opened_stage(found, IMPATIENT) as stage:
            assert (await anext(stage(Source(range(3)).stream()))).index == 0
            assert opened == 1


async def test_a_stream_without_items_does_not_stall() -> None:
    source = Source(range(3), end=...)
    async with workers(1) as found, opened_stage(found, IMPATIENT) as stage:
        answers = stage(source.stream())
        assert [(await anext(answers)).index for _ in range(3)] == [0, 1, 2]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await anext(answers)


async def test_conditions_are_not_sent_ahead_to_a_worker_that_does_not_take_them() -> None:
    async with workers(1) as found, opened_stage(found) as stage:
        for version in range(3):
            stage.prefill(Conditions(version=version))
        assert await all_of(stage, Source(range(3))) == [0, 1, 2]
        assert stage._queue.qsize() == 1, "the end, which a rebuilt stream would need"


async def test_a_stream_is_rebuilt_at_the_only_worker() -> None:
    async with workers(1) as found:
        found[0].encode = breaking(2, StageLost("gone"))
        async with opened_stage(found) as stage:
            answers = stage(Source(range(4)).stream())
            got = [(await anext(answers)).index for _ in range(2)]
            found[0].encode = numbered
            assert got + [each.index async for each in answers] == [0, 1, 2, 3]


async def test_a_full_spare_is_tried_until_it_has_capacity() -> None:
    async with workers(2) as found:
        found[0].encode = breaking(1, StageLost("gone"))
        num_refused = 0

        async def full(_: Requests, __: Context) -> Responses:
            nonlocal num_refused
            num_refused += 1
            if num_refused > 2:
                found[1].encode = numbered
            raise NoCapacity("full", retry_s=1.0)
            yield OPENED

        async with opened_stage(found) as stage:
            found[1].encode = full
            found[0].encode = full
            assert await all_of(stage, Source(range(3))) == [0, 1, 2]
        assert num_refused >= 3


async def test_a_stream_that_every_worker_loses_ends() -> None:
    """A block that no worker survives must not end one worker after another."""
    async with workers(2) as found:
        opened = 0

        async def deadly(requests: Requests, context: Context) -> Responses:
            nonlocal opened
            opened += 1
            async for each in breaking(2, StageFailed("it cannot be made"))(requests, context):
                yield each

        for each in found:
            each.encode = deadly
        async with opened_stage(found) as stage:
            with pytest.raises(StageFailed, match="it cannot be made"):
                await all_of(stage, Source(range(5)))
        assert opened == 4


async def test_an_error_of_the_client_is_not_a_loss() -> None:
    async with workers(2) as found:
        found[0].encode = breaking(1, InvalidAudio("no sound"))
        async with opened_stage(found) as stage:
            with pytest.raises(InvalidAudio):
                await all_of(stage, Source(range(3)))


@pytest.mark.parametrize("error", [StageLost("the stage before"), RuntimeError("ours")])
async def test_an_error_of_the_items_is_raised_and_the_stream_not_rebuilt(error: Exception) -> None:
    source = Source(range(2), end=error)
    async with workers(1) as found, opened_stage(found) as stage:
        with pytest.raises(type(error), match=str(error)):
            await all_of(stage, source)
        assert source.closed.is_set()


async def test_time_that_the_reader_takes_does_not_count_against_the_worker() -> None:
    async with workers(1) as found, opened_stage(found, IMPATIENT) as stage:
        rebuilt: list[int] = []
        stage.on_rebuilt = rebuilt.append
        got = []
        async for each in stage(Source(range(4)).stream()):
            got.append(each.index)
            await asyncio.sleep(0.5)
        assert got == [0, 1, 2, 3]
        assert not rebuilt


async def test_a_worker_that_never_closes_the_stream_is_replaced() -> None:
    async def endless(requests: Requests, _: Context) -> Responses:
        await receive_open(requests)
        yield OPENED
        async for each in parts(requests, "piece"):
            yield block(int(each.data))
        await asyncio.Event().wait()

    async with workers(2) as found:
        found[0].encode = endless
        async with opened_stage(found, IMPATIENT) as stage:
            assert await all_of(stage, Source(range(3))) == [0, 1, 2]
