"""Tests of avatar.runtime.pipeline."""

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from avatar.aio import background
from avatar.runtime.admission import Usage
from avatar.runtime.device_queue import Device
from avatar.runtime.pipeline import Stage, flatten, local
from avatar.types import Session

WAIT_S = 10.0
SESSION = Session("a", seed=0, motion=torch.zeros(0))


@dataclass(eq=False)
class Sum:
    """What a `Summing` carries from item to item."""

    total: int


class Summing:
    """A streaming model: the sum of all items so far, begun at the session's seed."""

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
        """States that are alive."""
        return sum(each() is not None for each in self.opened)


class Gated(Summing):
    """A model whose steps wait until they are let through."""

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
    """A stream of items, and what became of it."""

    items: Iterable[int]
    taken: list[int] = field(default_factory=list)
    is_closed: bool = False

    async def stream(self) -> AsyncGenerator[int, None]:
        try:
            for item in self.items:
                self.taken.append(item)
                yield item
        finally:
            self.is_closed = True


@pytest.fixture
def device() -> Iterator[Device]:
    with Device() as device:
        yield device


async def settled(device: Device) -> None:
    """Wait until the thread has let go of the step before."""
    await device.run(int)


def row(model: Summing, device: Device, length: int) -> Stage[int, int]:
    """Stages in a row, all at one model."""

    def stage(items: AsyncGenerator[int, None]) -> AsyncGenerator[int, None]:
        for _ in range(length):
            items = local(model, SESSION, device)(items)
        return items

    return stage


async def test_items_are_answered_in_order(device: Device) -> None:
    stage = local(Summing(), Session("a", seed=10, motion=torch.zeros(0)), device)
    assert [out async for out in stage(Source([1, 2, 3]).stream())] == [11, 13, 16]


async def test_stages_in_a_row_pass_items_on(device: Device) -> None:
    assert [out async for out in row(Summing(), device, 2)(Source([1, 1, 1]).stream())] == [1, 3, 6]


async def test_tensor_code_never_runs_on_the_event_loop(device: Device) -> None:
    model = Summing()
    assert [out async for out in local(model, SESSION, device)(Source([1, 2]).stream())]
    assert len(model.threads) == 1
    assert threading.get_ident() not in model.threads


async def test_interleaved_equals_alone(device: Device) -> None:
    model = Summing()
    streams = [local(model, SESSION, device)(Source(range(n, n + 5)).stream()) for n in range(3)]
    interleaved = [[await anext(stream) for stream in streams] for _ in range(5)]
    alone = [[out async for out in local(model, SESSION, device)(Source(range(n, n + 5)).stream())] for n in range(3)]
    assert [list(outs) for outs in zip(*interleaved, strict=True)] == alone


async def test_closing_a_stream_frees_state(device: Device) -> None:
    model = Summing()
    stage = local(model, SESSION, device)
    assert not model.opened, "a state is opened when its stream is"
    gc.disable()
    try:
        stream, other = stage(Source([1, 2]).stream()), stage(Source([1, 2]).stream())
        assert (await anext(stream), await anext(other)) == (1, 1)
        assert model.num_states == 2
        await stream.aclose()
        await settled(device)
        assert model.num_states == 1
        assert [out async for out in other] == [3]
        await settled(device)
        assert model.num_states == 0
    finally:
        gc.enable()


async def test_closing_the_last_stage_closes_all(device: Device) -> None:
    model, source = Summing(), Source(range(100))
    stream = row(model, device, 3)(source.stream())
    await anext(stream)
    assert model.num_states == 3
    assert not source.is_closed
    await stream.aclose()
    await settled(device)
    assert model.num_states == 0
    assert source.is_closed
    assert len(source.taken) < 10


async def test_an_error_upstream_surfaces_downstream_and_closes_all(device: Device) -> None:
    async def failing() -> AsyncGenerator[int, None]:
        yield 1
        raise ConnectionError("the sound is gone")

    model = Summing()
    stream = row(model, device, 3)(failing())
    assert await anext(stream) == 1
    with pytest.raises(ConnectionError, match="the sound is gone"):
        await anext(stream)
    await settled(device)
    gc.collect()  # the error's traceback goes round in circles
    assert model.num_states == 0


async def test_an_error_in_a_step_surfaces_and_closes_the_source(device: Device) -> None:
    source = Source([1, -1, 1])
    stream = row(Summing(), device, 2)(source.stream())
    assert await anext(stream) == 1
    with pytest.raises(ValueError, match="-1 is below 0"):
        await anext(stream)
    assert source.is_closed


async def test_an_error_in_open_surfaces_before_an_item_is_taken(device: Device) -> None:
    class Broken(Summing):
        def open(self, session: Session) -> Sum:
            raise MemoryError(f"no room for {session.id}")

    source = Source([1])
    with pytest.raises(MemoryError, match="no room for a"):
        await anext(local(Broken(), SESSION, device)(source.stream()))
    assert source.taken == []


async def test_a_busy_thread_loses_no_result(device: Device) -> None:
    released = threading.Event()
    busy = device.submit(released.wait, WAIT_S)
    streams = [local(Summing(), SESSION, device)(Source([1, 2, 3]).stream()) for _ in range(3)]

    async def drain(stream: AsyncGenerator[int, None]) -> list[int]:
        return [out async for out in stream]

    async with asyncio.TaskGroup() as tasks:
        drained = [tasks.create_task(drain(stream)) for stream in streams]
        await asyncio.sleep(0.01)
        assert not any(each.done() for each in drained)
        released.set()
    assert busy.result()
    assert [each.result() for each in drained] == [[1, 3, 6]] * 3


async def test_cancelling_in_the_middle_of_a_step_leaves_the_thread_to_others(device: Device) -> None:
    model, source = Gated(), Source([1, 2, 3])
    stream = local(model, SESSION, device)(source.stream())
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.to_thread(model.is_stepping.wait, WAIT_S)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert source.is_closed, "the source does not wait for the step"
    model.gate.set()
    other = local(Summing(), SESSION, device)(Source([4]).stream())
    assert [out async for out in other] == [4]
    assert source.taken == [1, 2, 3]
    del waiting
    await stream.aclose()
    await settled(device)
    gc.collect()  # the cancelled task and its error refer to each other
    assert model.num_states == 0


async def test_usage_adds_up(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(s=10)
    clock = SimpleNamespace(perf_counter_ns=lambda: now.s * 10**9, time_ns=lambda: now.s * 10**9)
    monkeypatch.setattr("avatar.runtime.device_queue.time", clock)

    class Slow(Summing):
        def step(self, item: int, state: Sum) -> int:
            now.s += item
            return super().step(item, state)

    usage = Usage()
    stream = local(Slow(), SESSION, device, usage)(Source([1, 2]).stream())
    await anext(stream)
    assert usage == Usage(busy_s=1, waited_s=0, start_ns=10 * 10**9, end_ns=11 * 10**9)
    await anext(stream)
    assert usage == Usage(busy_s=3, waited_s=0, start_ns=11 * 10**9, end_ns=13 * 10**9)
    await stream.aclose()


async def test_three_items_are_read_before_the_caller_comes_back(device: Device) -> None:
    model, source = Summing(), Source([1] * 10)
    stream = local(model, SESSION, device)(source.stream())
    assert await anext(stream) == 1
    for _ in range(20):
        await settled(device)
    assert source.taken == [1, 1, 1]
    assert [out async for out in stream] == list(range(2, 11))
    assert source.is_closed


async def test_the_next_item_is_made_while_one_is_taken(device: Device) -> None:
    model = Summing()
    stream = local(model, SESSION, device)(Source([1, 1, 1]).stream())
    assert await anext(stream) == 1
    await settled(device)
    await settled(device)
    state = model.opened[0]()
    assert state is not None
    assert state.total == 3
    del state
    assert [item async for item in stream] == [2, 3]


@pytest.mark.parametrize("error", [ConnectionError("gone"), asyncio.CancelledError("gone")], ids=["lost", "cancelled"])
async def test_an_error_upstream_is_raised_behind_what_was_made_before_it(device: Device, error: BaseException) -> None:
    async def failing() -> AsyncGenerator[int, None]:
        yield 1
        yield 1
        raise error

    stream = local(Summing(), SESSION, device)(failing())
    async with asyncio.timeout(WAIT_S):
        assert [await anext(stream), await anext(stream)] == [1, 2]
        with pytest.raises(type(error)):
            await anext(stream)


async def test_flatten_gives_each_item_of_each_list() -> None:
    async def lists() -> AsyncGenerator[list[int], None]:
        for items in ([], [1, 2], [], [3]):
            yield items

    assert [item async for item in flatten(lists())] == [1, 2, 3]


async def test_closing_flatten_closes_what_it_reads() -> None:
    closed = []

    async def lists() -> AsyncGenerator[list[int], None]:
        try:
            yield [1, 2, 3]
        finally:
            closed.append(True)

    async with aclosing(flatten(lists())) as items:
        assert await anext(items) == 1
        assert not closed
    assert closed


async def test_what_runs_beside_ends_with_the_body() -> None:
    steps = []

    async def run() -> None:
        steps.append("begun")
        try:
            await asyncio.sleep(WAIT_S)
        finally:
            await asyncio.sleep(0.01)
            steps.append("ended")

    async with background(run()) as task:
        await asyncio.sleep(0)
        assert steps == ["begun"]
    assert steps == ["begun", "ended"]
    assert task.cancelled()


async def test_what_fails_beside_leaves_the_body_alone() -> None:
    async def run() -> None:
        raise ConnectionError("lost")

    async with background(run()) as task:
        await asyncio.wait({task})
        await asyncio.sleep(0)
        body_goes_on = True
    assert body_goes_on
    assert isinstance(task.exception(), ConnectionError)


async def test_nobody_has_to_look_at_what_failed_beside(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        try:
            await asyncio.sleep(WAIT_S)
        finally:
            raise ConnectionError("lost while it was closed")

    async with background(run()):
        await asyncio.sleep(0)
    gc.collect()
    assert not caplog.records


async def test_an_error_of_the_body_goes_past_what_runs_beside() -> None:
    ended = asyncio.Event()

    async def run() -> None:
        try:
            await asyncio.sleep(WAIT_S)
        finally:
            ended.set()

    async def body() -> None:
        async with background(run()):
            await asyncio.sleep(0)
            raise KeyError("the body's own")

    with pytest.raises(KeyError, match="the body's own"):
        await body()
    assert ended.is_set()
