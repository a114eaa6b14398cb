"""Tests of avatar.runtime.device_queue: the order of jobs, their cancellation, and their errors."""

import asyncio
import gc
import weakref
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from avatar.runtime.device_queue import DeviceQueue
from avatar.runtime.pipeline import local
from avatar.types import Session
from tests.busy import WAIT_S, busy, until_waiting

BLOCK_S = 0.48


@dataclass(frozen=True)
class Item:
    """An item of a stream; due_s as a block's."""

    name: str
    due_s: float | None = None


class Recorder:
    """A streaming model that records its steps. A step answers the item's name in capitals, or fails if it has some."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    def open(self, session: Session) -> list[str]:
        return [session.id]

    def step(self, item: Item, _: list[str]) -> str:
        self.steps.append(item.name)
        if item.name.isupper():
            raise ValueError(f"{item.name} is in capitals")
        return item.name.upper()


def session(name: str) -> Session:
    return Session(name, seed=0, motion=torch.zeros(0))


async def stream(*items: Item, last: asyncio.Event) -> AsyncGenerator[Item, None]:
    """Yield the items; the last one only after the event."""
    for item in items[:-1]:
        yield item
    await last.wait()
    yield items[-1]


async def test_live_jobs_run_by_deadline_and_others_after_them_as_they_came(queue: DeviceQueue) -> None:
    order: list[str] = []
    async with asyncio.TaskGroup() as tasks:
        with busy(queue):
            for name, due_s in (("offline", None), ("later", 30.0), ("next", None), ("soon", 10.0), ("late", -5.0)):
                tasks.create_task(queue.run(order.append, name, due_s=due_s))
            await until_waiting(queue, 5)
            assert order == []
    assert order == ["late", "soon", "later", "offline", "next"]


async def test_offline_streams_take_turns(queue: DeviceQueue) -> None:
    model, submitted, start = Recorder(), 0, asyncio.Event()

    async def items(name: str) -> AsyncGenerator[Item, None]:
        nonlocal submitted
        await start.wait()
        for index in range(3):
            submitted += 1
            yield Item(f"{name}{index}")

    async def drain(name: str) -> None:
        answers = [each async for each in local(model, session(name), queue)(items(name))]
        assert answers == [f"{name.upper()}{index}" for index in range(3)]

    async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as tasks:
        for name in "abc":
            tasks.create_task(drain(name))
        await asyncio.sleep(0)
        await queue.run(int)  # the streams' states are open
        with busy(queue):
            start.set()
            while submitted < 9:  # noqa: ASYNC110
                await asyncio.sleep(0)
    turns = [set(model.steps[first : first + 3]) for first in (0, 3, 6)]
    assert turns == [{f"{name}{index}" for name in "abc"} for index in range(3)]


async def test_an_item_has_its_own_deadline_or_in_a_live_stream_one_block_from_now(
    queue: DeviceQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avatar.runtime.pipeline.time", SimpleNamespace(monotonic=lambda: 100.0))
    model = Recorder()
    opened = [
        (Item("offline"), False),
        (Item("undated"), True),
        (Item("after", 100 + BLOCK_S + 0.01), True),
        (Item("before", 100 + BLOCK_S - 0.01), False),
    ]
    streams = []
    for item, is_live in opened:
        last = asyncio.Event()
        items = stream(Item("first"), item, last=last)
        streams.append((local(model, session("a"), queue, live_block_s=BLOCK_S if is_live else None)(items), last))
        await anext(streams[-1][0])
    model.steps.clear()
    async with asyncio.TaskGroup() as tasks:
        with busy(queue):
            for number, (each, last) in enumerate(streams, 1):
                last.set()
                tasks.create_task(anext(each))
                await until_waiting(queue, number)
    assert model.steps == ["before", "undated", "after", "offline"]
    for each, _ in streams:
        await each.aclose()


async def test_a_job_that_is_cancelled_while_it_waits_never_runs_and_is_freed(queue: DeviceQueue) -> None:
    model, items = Recorder(), [Item("first"), Item("second")]
    second = weakref.ref(items[1])
    last = asyncio.Event()
    running = local(model, session("a"), queue)(stream(*items, last=last))
    await anext(running)
    del items
    with busy(queue):
        last.set()
        waiting = asyncio.ensure_future(anext(running))
        await until_waiting(queue, 1)
        waiting.cancel()
        await asyncio.wait({waiting})
        assert waiting.cancelled()
        del waiting, running
        gc.collect()  # the cancelled task and its error refer to each other
        assert queue.num_waiting == 0
        assert second() is None
    await queue.run(int)
    assert model.steps == ["first"]


async def test_closing_a_stream_cancels_its_waiting_job(queue: DeviceQueue) -> None:
    model, last = Recorder(), asyncio.Event()
    running = local(model, session("a"), queue)(stream(Item("first"), Item("second"), last=last))
    await anext(running)
    with busy(queue):
        last.set()
        await until_waiting(queue, 1)
        await running.aclose()
        assert queue.num_waiting == 0
    await queue.run(int)
    assert model.steps == ["first"]


async def test_an_error_is_raised_at_its_caller_alone(queue: DeviceQueue) -> None:
    async with asyncio.TaskGroup() as tasks:
        with busy(queue):
            wrong = asyncio.ensure_future(queue.run(int, "no number"))
            right = tasks.create_task(queue.run(int, "7"))
            await until_waiting(queue, 2)
    assert right.result() == 7
    with pytest.raises(ValueError, match="no number"):
        await wrong


async def test_a_streams_next_item_waits_outside_the_queue(queue: DeviceQueue) -> None:
    model = Recorder()
    with busy(queue):
        first = queue.step(model, Item("a0"), [])
        second = queue.step(model, Item("a1"), [], after=first)
        third = queue.step(model, Item("a2"), [], after=second)
        other = queue.step(model, Item("b0"), [])
        assert queue.num_waiting == 2
    assert [await asyncio.wrap_future(job.future) for job in (first, second, third, other)] == ["A0", "A1", "A2", "B0"]
    assert model.steps == ["a0", "b0", "a1", "a2"], "no stream's second item runs before another's first"
    assert await asyncio.wrap_future(queue.step(model, Item("a3"), [], after=third).future) == "A3"


async def test_then_is_applied_before_the_next_job_starts(queue: DeviceQueue) -> None:
    model = Recorder()

    def then(result: str) -> str:
        model.steps.append(f"then {result}")
        return f"{result}!"

    with busy(queue):
        first = queue.step(model, Item("a0"), [], then=then)
        second = queue.step(model, Item("a1"), [], then=then, after=first)
        other = queue.step(model, Item("b0"), [], then=then)
    assert [await asyncio.wrap_future(job.future) for job in (first, second, other)] == ["A0!", "A1!", "B0!"]
    assert model.steps == ["a0", "then A0", "b0", "then B0", "a1", "then A1"]


async def test_a_job_behind_one_that_failed_or_was_cancelled_never_runs(queue: DeviceQueue) -> None:
    model = Recorder()
    with busy(queue):
        wrong, cancelled = (queue.step(model, Item(name), []) for name in ("WRONG", "cancelled"))
        for job in (wrong, cancelled):
            queue.step(model, Item("never"), [], after=queue.step(model, Item("next"), [], after=job))
        queue.cancel(cancelled)
    with pytest.raises(ValueError, match="WRONG is in capitals"):
        await asyncio.wrap_future(wrong.future)
    queue.step(model, Item("late"), [], after=wrong)
    assert await queue.run(int) == 0
    assert model.steps == ["WRONG"]


async def test_a_job_that_is_cancelled_while_it_is_held_back_never_runs_and_is_freed(queue: DeviceQueue) -> None:
    model, item = Recorder(), Item("a1")
    cancelled = weakref.ref(item)
    with busy(queue):
        first = queue.step(model, Item("a0"), ["a"])
        second = queue.step(model, item, ["a"], after=first)
        queue.cancel(second)
        del second, item
    await asyncio.wrap_future(first.future)
    await queue.run(int)
    assert model.steps == ["a0"]
    assert cancelled() is None


async def test_closing_the_queue_cancels_the_jobs_that_wait() -> None:
    order: list[str] = []
    with DeviceQueue() as queue, busy(queue):
        waiting = asyncio.ensure_future(queue.run(order.append, "never"))
        await until_waiting(queue, 1)
        closing = asyncio.create_task(asyncio.to_thread(queue.__exit__, None, None, None))
        with pytest.raises(asyncio.CancelledError):
            await waiting
    await closing
    assert order == []
    with pytest.raises(RuntimeError, match="closed"):
        queue.submit(int)


async def test_a_job_is_done_when_the_device_has_finished_it() -> None:
    """A call to a GPU returns before its work is done."""
    done: list[str] = []
    with DeviceQueue(synchronize=lambda: done.append("synchronized")) as queue:
        await queue.run(done.append, "called")
    assert done == ["called", "synchronized"]
