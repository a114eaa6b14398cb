"""Tests of avatar.runtime.device_queue: who goes first, and who goes away."""

import asyncio
import gc
import weakref
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

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
    """A streaming model that notes what it is asked for; an item in capitals is a mistake."""

    def __init__(self) -> None:
        self.steps: list[Any] = []

    def open(self, session: Session) -> list[str]:
        return [session.id]

    def step(self, item: Item, _: list[str]) -> str:
        self.steps.append(item.name)
        if item.name.isupper():
            raise ValueError(f"{item.name} is a mistake")
        return item.name.upper()


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


async def test_what_is_made_of_a_result_is_made_before_the_next_begins(device: Device) -> None:
    model = Noting()

    def noted(result: str) -> str:
        model.steps.append(f"then {result}")
        return f"{result}!"

    with busy(device):
        first = device.step(model, Item("a0"), [], then=noted)
        second = device.step(model, Item("a1"), [], then=noted, after=first)
        other = device.step(model, Item("b0"), [], then=noted)
    assert [await device.done(job) for job in (first, second, other)] == ["A0!", "A1!", "B0!"]
    assert model.steps == ["a0", "then A0", "b0", "then B0", "a1", "then A1"]


async def test_behind_what_failed_or_was_dropped_nothing_is_done(device: Device) -> None:
    model = Noting()
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
    model, item = Noting(), Item("a1")
    dropped = weakref.ref(item)
    with busy(device):
        first = device.step(model, Item("a0"), ["a"])
        second = device.step(model, item, ["a"], after=first)
        device.drop(second)
        del second, item
    await device.done(first)
    await device.run(int)
    assert model.steps == ["a0"]
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
