"""Tests of avatar.runtime.pipeline."""

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from avatar.runtime.admission import StepTimes
from avatar.runtime.device_queue import DeviceQueue
from avatar.runtime.pipeline import Stage, StreamUsage, flatten, local
from avatar.types import Conditions, Session
from tests.busy import WAIT_S

SESSION = Session("a", seed=0, motion=torch.zeros(0))


@dataclass(eq=False)
class Sum:
    """State of a `Summing` model."""

    total: int


class Summing:
    """A streaming model that answers the session's seed plus the sum of all items so far."""

    def __init__(self) -> None:
        self.opened: list[weakref.ref[Sum]] = []
        self.threads: set[int] = set()

    def open(self, session: Session) -> Sum:
        state = Sum(session.seed)
        self.opened.append(weakref.ref(state))
        return state

    def step(self, item: int, state: Sum) -> int:
        self.threads.add(threading.get_ident())
        if item < 0:
            raise ValueError(f"{item} is below 0")
        state.total += item
        return state.total

    @property
    def num_states(self) -> int:
        """Number of states that are alive."""
        return sum(each() is not None for each in self.opened)


class Gated(Summing):
    """A model whose steps wait for a gate to open."""

    def __init__(self) -> None:
        super().__init__()
        self.is_stepping = threading.Event()
        self.gate = threading.Event()

    def step(self, item: int, state: Sum) -> int:
        self.is_stepping.set()
        assert self.gate.wait(WAIT_S)
        return super().step(item, state)


@dataclass
class Source:
    """A stream of items, the items that were read, and whether it was closed."""

    items: Iterable[Any]
    taken: list[Any] = field(default_factory=list)
    is_closed: bool = False

    async def stream(self) -> AsyncGenerator[Any, None]:
        try:
            for item in self.items:
                self.taken.append(item)
                yield item
        finally:
            self.is_closed = True


async def settled(queue: DeviceQueue) -> None:
    """Wait until the thread has finished the jobs before this one and freed their states."""
    await queue.run(int)


def row(model: Summing, queue: DeviceQueue, length: int) -> Stage[int, int]:
    """Return a number of stages in a row, all at one model."""

    def stage(items: AsyncGenerator[int, None]) -> AsyncGenerator[int, None]:
        for _ in range(length):
            items = local(model, SESSION, queue)(items)
        return items

    return stage


async def test_items_are_answered_in_order(queue: DeviceQueue) -> None:
    stage = local(Summing(), Session("a", seed=10, motion=torch.zeros(0)), queue)
    assert [out async for out in stage(Source([1, 2, 3]).stream())] == [11, 13, 16]


async def test_stages_in_a_row_pass_items_on(queue: DeviceQueue) -> None:
    assert [out async for out in row(Summing(), queue, 2)(Source([1, 1, 1]).stream())] == [1, 3, 6]


async def test_tensor_code_never_runs_on_the_event_loop(queue: DeviceQueue) -> None:
    model = Summing()
    assert [out async for out in local(model, SESSION, queue)(Source([1, 2]).stream())]
    assert len(model.threads) == 1
    assert threading.get_ident() not in model.threads


async def test_interleaved_equals_alone(queue: DeviceQueue) -> None:
    model = Summing()
    streams = [local(model, SESSION, queue)(Source(range(n, n + 5)).stream()) for n in range(3)]
    interleaved = [[await anext(stream) for stream in streams] for _ in range(5)]
    alone = [[out async for out in local(model, SESSION, queue)(Source(range(n, n + 5)).stream())] for n in range(3)]
    assert [list(outs) for outs in zip(*interleaved, strict=True)] == alone


async def test_closing_a_stream_frees_state(queue: DeviceQueue) -> None:
    model = Summing()
    stage = local(model, SESSION, queue)
    assert not model.opened, "no state before the stream"
    gc.disable()
    try:
        stream, other = stage(Source([1, 2]).stream()), stage(Source([1, 2]).stream())
        assert (await anext(stream), await anext(other)) == (1, 1)
        assert model.num_states == 2
        await stream.aclose()
        await settled(queue)
        assert model.num_states == 1
        assert [out async for out in other] == [3]
        await settled(queue)
        assert model.num_states == 0
    finally:
        gc.enable()


async def test_closing_the_last_stage_closes_all(queue: DeviceQueue) -> None:
    model, source = Summing(), Source(range(100))
    stream = row(model, queue, 3)(source.stream())
    await anext(stream)
    assert model.num_states == 3
    assert not source.is_closed
    await stream.aclose()
    await settled(queue)
    assert model.num_states == 0
    assert source.is_closed
    assert len(source.taken) < 10


async def test_an_error_upstream_surfaces_downstream_and_closes_all(queue: DeviceQueue) -> None:
    async def failing() -> AsyncGenerator[int, None]:
        yield 1
        raise ConnectionError("the source is lost")

    model = Summing()
    stream = row(model, queue, 3)(failing())
    assert await anext(stream) == 1
    with pytest.raises(ConnectionError, match="the source is lost"):
        await anext(stream)
    await settled(queue)
    gc.collect()  # the error and its traceback refer to each other
    assert model.num_states == 0


async def test_an_error_in_a_step_surfaces_and_closes_the_source(queue: DeviceQueue) -> None:
    source = Source([1, -1, 1])
    stream = row(Summing(), queue, 2)(source.stream())
    assert await anext(stream) == 1
    with pytest.raises(ValueError, match="-1 is below 0"):
        await anext(stream)
    assert source.is_closed


async def test_an_error_in_open_surfaces_before_an_item_is_taken(queue: DeviceQueue) -> None:
    class Broken(Summing):
        def open(self, session: Session) -> Sum:
            raise MemoryError(f"no memory for {session.id}")

    source = Source([1])
    with pytest.raises(MemoryError, match="no memory for a"):
        await anext(local(Broken(), SESSION, queue)(source.stream()))
    assert source.taken == []


async def test_a_stream_cancelled_during_a_step_does_not_block_the_device(queue: DeviceQueue) -> None:
    model, source = Gated(), Source([1, 2, 3])
    stream = local(model, SESSION, queue)(source.stream())
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.to_thread(model.is_stepping.wait, WAIT_S)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert source.is_closed, "without waiting for the step"
    model.gate.set()
    other = local(Summing(), SESSION, queue)(Source([4]).stream())
    assert [out async for out in other] == [4]
    assert source.taken == [1, 2, 3]
    del waiting
    await stream.aclose()
    await settled(queue)
    gc.collect()  # the cancelled task and its error refer to each other
    assert model.num_states == 0


async def test_usage_counts_every_step_and_describes_the_last(
    queue: DeviceQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = SimpleNamespace(s=10)
    clock = SimpleNamespace(perf_counter_ns=lambda: now.s * 10**9, time_ns=lambda: now.s * 10**9)
    monkeypatch.setattr("avatar.runtime.device_queue.time", clock)

    class Slow(Summing):
        def step(self, item: int, state: Sum) -> int:
            now.s += item
            return super().step(item, state)

    usage = StreamUsage(StepTimes(0.48))
    stream = local(Slow(), SESSION, queue, usage)(Source([1, 2]).stream())
    await anext(stream)
    assert (usage.busy_s, usage.last_step) == (1, (10 * 10**9, 11 * 10**9, 0))
    await anext(stream)
    assert (usage.busy_s, usage.last_step) == (3, (11 * 10**9, 13 * 10**9, 0))
    assert list(usage.step_times or ()) == [1, 2]
    await stream.aclose()


async def test_at_most_three_items_are_read_ahead_of_the_caller(queue: DeviceQueue) -> None:
    model, source = Summing(), Source([1] * 10)
    stream = local(model, SESSION, queue)(source.stream())
    assert await anext(stream) == 1
    for _ in range(20):
        await settled(queue)
    assert source.taken == [1, 1, 1]
    assert [out async for out in stream] == list(range(2, 11))
    assert source.is_closed


async def test_the_next_item_is_computed_while_the_caller_has_one(queue: DeviceQueue) -> None:
    model = Summing()
    stream = local(model, SESSION, queue)(Source([1, 1, 1]).stream())
    assert await anext(stream) == 1
    await settled(queue)
    await settled(queue)
    state = model.opened[0]()
    assert state is not None
    assert state.total == 3
    del state
    assert [item async for item in stream] == [2, 3]


@pytest.mark.parametrize("error", [ConnectionError("gone"), asyncio.CancelledError("gone")], ids=["lost", "cancelled"])
async def test_an_error_upstream_is_raised_after_the_answers_before_it(
    queue: DeviceQueue, error: BaseException
) -> None:
    async def failing() -> AsyncGenerator[int, None]:
        yield 1
        yield 1
        raise error

    stream = local(Summing(), SESSION, queue)(failing())
    async with asyncio.timeout(WAIT_S):
        assert [await anext(stream), await anext(stream)] == [1, 2]
        with pytest.raises(type(error)):
            await anext(stream)


async def test_flatten_yields_each_item_of_each_list_and_closes_its_source() -> None:
    closed = []

    async def lists() -> AsyncGenerator[list[int], None]:
        try:
            for items in ([], [1, 2], [], [3, 4]):
                yield items
        finally:
            closed.append(True)

    async with aclosing(flatten(lists())) as items:
        assert [await anext(items) for _ in range(3)] == [1, 2, 3]
        assert not closed
    assert closed


def conditions(version: int) -> Conditions:
    return Conditions(version, torch.zeros(0), torch.zeros(0))


async def test_conditions_are_prefilled_ahead_of_items_and_not_answered(queue: DeviceQueue) -> None:
    done: list[tuple[int, int]] = []

    async def items() -> AsyncGenerator[Any, None]:
        for version in (0, 1):
            yield conditions(version)
            await settled(queue)
            yield version + 1

    stage = local(Summing(), SESSION, queue, prefill=lambda given, state: done.append((given.version, state.total)))
    assert [out async for out in stage(items())] == [1, 3]
    assert done in ([(0, 0), (1, 0)], [(0, 0), (1, 1)])


async def test_a_newer_version_replaces_one_that_waits_and_the_end_cancels_it(queue: DeviceQueue) -> None:
    model, done = Gated(), list[int]()
    stage = local(model, SESSION, queue, prefill=lambda given, _: done.append(given.version))
    source = Source([1, conditions(0), conditions(1), 2])
    async with aclosing(stage(source.stream())) as stream:
        answer = asyncio.ensure_future(anext(stream))
        await asyncio.to_thread(model.is_stepping.wait, WAIT_S)
        await asyncio.sleep(0)
        model.gate.set()
        assert await answer == 1
        assert await anext(stream) == 3
    await settled(queue)
    assert done in ([1], [])
    assert model.num_states == 0


async def test_a_kept_error_of_the_items_keeps_no_state(queue: DeviceQueue) -> None:
    model = Summing()

    async def items() -> AsyncGenerator[int, None]:
        yield 1
        raise LookupError("the caller is gone")

    gc.disable()
    try:
        stream = local(model, SESSION, queue)(items())
        with pytest.raises(LookupError) as kept:
            _ = [out async for out in stream]
        await settled(queue)
        assert model.num_states == 0, kept
    finally:
        gc.enable()
