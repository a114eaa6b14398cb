"""Tests of avatar.runtime.device_queue: who goes first, who goes together, and who goes away."""

import asyncio
import gc
import weakref
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from avatar.runtime.admission import Usage
from avatar.runtime.device_queue import Device
from avatar.runtime.pipeline import local
from avatar.types import BLOCK_S, Session
from tests.busy import busy, until_waiting


@pytest.fixture
def device() -> Iterator[Device]:
    with Device() as device:
        yield device


@dataclass(frozen=True)
class Item:
    """What a stream carries; due_s as a block's."""

    name: str
    due_s: float | None = None


class Noting:
    """A streaming model that notes what it is asked for; a session's state is a list of its name."""

    def __init__(self) -> None:
        self.steps: list[Any] = []

    def open(self, session: Session) -> list[str]:
        return [session.id]

    def step(self, item: Item, _: list[str]) -> str:
        self.steps.append(item.name)
        return item.name.upper()


class Together(Noting):
    """The same, and steps up to three items of one initial together; an item in capitals is a mistake."""

    def batch(self, item: Item, _: list[str]) -> tuple[str, int] | None:
        return None if item.name.isupper() else (item.name[0], 3)

    def step(self, item: Item, state: list[str]) -> str:
        if item.name.isupper():
            self.steps.append(item.name)
            raise ValueError(f"{item.name} is a mistake")
        return self.step_many([item], [state])[0]

    def step_many(self, items: Sequence[Item], states: Sequence[list[str]]) -> list[str]:
        self.steps.append([item.name for item in items])
        return [item.name + state[0] for item, state in zip(items, states, strict=True)]


def session(name: str) -> Session:
    return Session(name, seed=0, motion=torch.zeros(0))


async def stream(*items: Item, last: asyncio.Event | None = None) -> AsyncGenerator[Item, None]:
    """The items, the last one not before the event."""
    for item in items[:-1]:
        yield item
    if last is not None:
        await last.wait()
    yield items[-1]


async def test_what_will_be_missed_first_goes_first_and_what_nobody_waits_for_last(device: Device) -> None:
    order: list[str] = []
    async with asyncio.TaskGroup() as tasks:
        with busy(device):
            for name, due_s in (("offline", None), ("later", 30.0), ("next", None), ("soon", 10.0), ("late", -5.0)):
                tasks.create_task(device.run(order.append, name, due_s=due_s))
            await until_waiting(device, 5)
            assert order == []
    assert order == ["late", "soon", "later", "offline", "next"]


async def test_streams_without_a_hurry_take_turns(device: Device) -> None:
    """No stream waits for another's second block, however many it has."""
    model = Noting()

    async def drain(name: str) -> None:
        blocks = [Item(f"{name}{index}") for index in range(4)]
        assert [each async for each in local(model, session(name), device)(stream(*blocks))]

    async with asyncio.TaskGroup() as tasks:
        with busy(device):
            for name in "abc":
                tasks.create_task(drain(name))
            await until_waiting(device, 3)
    places = {name: [i for i, step in enumerate(model.steps) if step[0] == name] for name in "abc"}
    for index in range(4):
        turn = [places[name][index] for name in "abc"]
        assert max(turn) - min(turn) < 3, f"block {index} of all is stepped before block {index + 1} of any"


async def test_a_block_goes_by_its_own_time_and_that_of_a_live_stream_without_one_by_a_blocks(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avatar.runtime.pipeline.time", SimpleNamespace(monotonic=lambda: 100.0))
    model = Noting()
    opened = [
        (Item("offline"), False),
        (Item("undated"), True),
        (Item("after", 100 + BLOCK_S + 0.01), True),
        (Item("before", 100 + BLOCK_S - 0.01), False),
    ]
    streams = []
    for item, is_live in opened:
        said = asyncio.Event()
        items = stream(Item("first"), item, last=said)
        streams.append((local(model, session("a"), device, is_live=is_live)(items), said))
        await anext(streams[-1][0])
    model.steps.clear()
    async with asyncio.TaskGroup() as tasks:
        with busy(device):
            for number, (each, said) in enumerate(streams, 1):
                said.set()
                tasks.create_task(anext(each))
                await until_waiting(device, number)
    assert model.steps == ["before", "undated", "after", "offline"]
    for each, _ in streams:
        await each.aclose()


async def test_what_is_cancelled_while_it_waits_is_not_computed_and_holds_nothing(device: Device) -> None:
    model, items = Noting(), [Item("first"), Item("second")]
    second = weakref.ref(items[1])
    said = asyncio.Event()
    running = local(model, session("a"), device)(stream(*items, last=said))
    await anext(running)
    del items
    with busy(device):
        said.set()
        waiting = asyncio.ensure_future(anext(running))
        await until_waiting(device, 1)
        waiting.cancel()
        await asyncio.wait({waiting})
        assert waiting.cancelled()
        del waiting, running
        gc.collect()  # the cancelled task and its error refer to each other
        assert device.num_waiting == 0
        assert second() is None
    await device.run(int)
    assert model.steps == ["first"]


async def test_what_a_closed_stream_has_put_is_not_computed(device: Device) -> None:
    model, said = Noting(), asyncio.Event()
    running = local(model, session("a"), device)(stream(Item("first"), Item("second"), last=said))
    await anext(running)
    with busy(device):
        said.set()
        await until_waiting(device, 1)
        await running.aclose()
        assert device.num_waiting == 0
    await device.run(int)
    assert model.steps == ["first"]


async def test_an_error_reaches_who_asked_and_nobody_else(device: Device) -> None:
    async with asyncio.TaskGroup() as tasks:
        with busy(device):
            wrong = asyncio.ensure_future(device.run(int, "no number"))
            right = tasks.create_task(device.run(int, "7"))
            await until_waiting(device, 2)
    assert right.result() == 7
    with pytest.raises(ValueError, match="no number"):
        await wrong


async def test_what_waits_together_is_stepped_together_up_to_the_most(device: Device) -> None:
    model, usages = Together(), {name: Usage() for name in ("a1", "b1", "a2", "a3", "a4", "A5", "a6")}
    dues = {"a1": 4.0, "b1": 3.0, "a2": 2.0, "a3": 1.0, "a4": 5.0, "a6": None}

    async def step(name: str) -> Any:
        job = device.step(model, Item(name), [f" of {name}"], dues.get(name))
        made = await device.done(job)
        usages[name].note(*job.cost)
        return made

    with busy(device):
        steps = {name: asyncio.ensure_future(step(name)) for name in usages}
        await until_waiting(device, 7)
    done = await asyncio.gather(*steps.values(), return_exceptions=True)
    assert model.steps == [["a3", "a2", "a1"], ["b1"], ["a4"], "A5", ["a6"]], (
        "a pass holds nobody who is not waited for"
    )
    answers = dict(zip(steps, done, strict=True))
    assert isinstance(answers.pop("A5"), ValueError), "a mistake goes alone, and is nobody else's"
    assert answers == {name: f"{name} of {name}" for name in answers}
    assert [usages[name].shared_by for name in ("a1", "a2", "a3", "a4", "b1")] == [3, 3, 3, 1, 1]
    shared = usages["a1"]
    assert shared.busy_s == pytest.approx(shared.step_s / 3), "a stream pays its share"


async def test_a_streams_next_item_waits_outside_the_queue(device: Device) -> None:
    model = Noting()
    with busy(device):
        first = device.step(model, Item("a0"), [])
        second = device.step(model, Item("a1"), [], after=first)
        third = device.step(model, Item("a2"), [], after=second)
        other = device.step(model, Item("b0"), [])
        assert device.num_waiting == 2
    assert [await device.done(job) for job in (first, second, third, other)] == ["A0", "A1", "A2", "B0"]
    assert model.steps == ["a0", "b0", "a1", "a2"], "no stream's second item goes before another's first"
    assert await device.done(device.step(model, Item("a3"), [], after=third)) == "A3"


async def test_with_whom_an_item_goes_is_asked_when_the_one_before_is_done(device: Device) -> None:
    class Warming(Together):
        """A session is batched once it has made its first step."""

        def batch(self, item: Item, state: list[str]) -> tuple[str, int] | None:
            return super().batch(item, state) if len(state) > 1 else None

        def step_many(self, items: Sequence[Item], states: Sequence[list[str]]) -> list[str]:
            for state in states:
                state.append("warm")
            return super().step_many(items, states)

    model, jobs = Warming(), []
    with busy(device):
        for name in ("a", "b"):
            state = [name]
            jobs.append(device.step(model, Item("x0"), state))
            jobs.append(device.step(model, Item("x1"), state, after=jobs[-1]))
    for job in jobs:
        await device.done(job)
    assert model.steps == [["x0"], ["x0"], ["x1", "x1"]]


async def test_who_cannot_say_with_whom_it_goes_goes_alone(device: Device) -> None:
    class Confused(Together):
        def batch(self, item: Item, _: list[str]) -> tuple[str, int] | None:
            raise TypeError(f"what is {item.name}?")

    model = Confused()
    first = device.step(model, Item("a"), [" of a"])
    assert await device.done(device.step(model, Item("b"), [" of b"], after=first)) == "b of b"
    assert model.steps == [["a"], ["b"]]


async def test_what_is_made_of_a_result_is_made_before_the_next_begins(device: Device) -> None:
    model, other = Noting(), Together()

    def noted(result: str) -> str:
        model.steps.append(f"then {result}")
        return f"{result}!"

    with busy(device):
        first = device.step(model, Item("a0"), [], then=noted)
        second = device.step(model, Item("a1"), [], then=noted, after=first)
        pair = [device.step(other, Item("x"), [" of x"], then=noted) for _ in range(2)]
    assert [await device.done(job) for job in (first, second)] == ["A0!", "A1!"]
    assert [await device.done(job) for job in pair] == ["x of x!"] * 2
    assert model.steps == ["a0", "then A0", "then x of x", "then x of x", "a1", "then A1"]
    assert other.steps == [["x", "x"]]


async def test_behind_what_failed_or_was_dropped_nothing_is_done(device: Device) -> None:
    model = Together()
    with busy(device):
        wrong, dropped = (device.step(model, Item(name), []) for name in ("WRONG", "dropped"))
        for job in (wrong, dropped):
            device.step(model, Item("never"), [], after=device.step(model, Item("next"), [], after=job))
        device.drop(dropped)
    with pytest.raises(ValueError, match="is a mistake"):
        await device.done(wrong)
    device.step(model, Item("late"), [], after=wrong)
    assert await device.run(int) == 0
    assert model.steps == ["WRONG"]


async def test_what_is_dropped_behind_another_item_never_enters_the_queue(device: Device) -> None:
    asked = []

    class Asked(Together):
        def batch(self, item: Item, state: list[str]) -> tuple[str, int] | None:
            asked.append(item.name)
            return super().batch(item, state)

    model, item = Asked(), Item("a1")
    dropped = weakref.ref(item)
    with busy(device):
        first = device.step(model, Item("a0"), ["a"])
        second = device.step(model, item, ["a"], after=first)
        device.drop(second)
        del second, item
    await device.done(first)
    await device.run(int)
    assert asked == ["a0"]
    assert dropped() is None


async def test_closing_a_device_ends_what_waits() -> None:
    order: list[str] = []
    with Device() as other, busy(other):
        waiting = asyncio.ensure_future(other.run(order.append, "never"))
        await until_waiting(other, 1)
        closing = asyncio.create_task(asyncio.to_thread(other.__exit__, None, None, None))
        with pytest.raises(asyncio.CancelledError):
            await waiting
    await closing
    assert order == []
    with pytest.raises(RuntimeError, match="closed"):
        other.submit(int)


async def test_a_step_lasts_until_the_device_has_done_it() -> None:
    """A GPU's work is only begun when its call returns."""
    done: list[str] = []
    with Device(wait=lambda: done.append("waited")) as device:
        await device.run(done.append, "called")
    assert done == ["called", "waited"]
