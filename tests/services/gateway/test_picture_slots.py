"""Tests of services.gateway.access.picture_slots, over workers that take one round for a picture."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field

import pytest

from avatar.errors import NoCapacity
from services.gateway.access import picture_slots
from services.gateway.access.picture_slots import MAX_WAITING, PictureSlots
from services.gateway.access.tenants import Tenant
from tests.services.gateway.clock import settled
from tests.services.gateway.test_quotas import calling


@dataclass
class Workers:
    """Workers whose pictures are done at the end of a round; done: the round at whose end each tenant's were."""

    num_slots: int = 1
    round: int = 0
    done: dict[str, list[int]] = field(default_factory=dict)
    encoding: list[asyncio.Event] = field(default_factory=list)

    async def prepare(self, slots: PictureSlots, tenant: str) -> None:
        with calling(Tenant(tenant)):
            async with slots.slot():
                finished = asyncio.Event()
                self.encoding.append(finished)
                await finished.wait()
                self.done.setdefault(tenant, []).append(self.round)

    async def end_round(self) -> None:
        await settled()
        self.round += 1
        assert len(self.encoding) <= self.num_slots
        encoding, self.encoding = self.encoding, []
        for finished in encoding:
            finished.set()
        await settled()


@pytest.mark.parametrize("num_slots", [1, 3])
async def test_one_tenants_flood_at_most_doubles_anothers_latency(num_slots: int) -> None:
    workers = Workers(num_slots)
    slots = PictureSlots(lambda: num_slots)
    async with asyncio.TaskGroup() as tasks:
        for _ in range(MAX_WAITING):
            tasks.create_task(workers.prepare(slots, "flood"))
        await workers.end_round()
        for _ in range(3):
            tasks.create_task(workers.prepare(slots, "other"))
            sent = workers.round
            while "other" not in workers.done:
                while len(slots._waiting.get("flood", ())) < MAX_WAITING:
                    tasks.create_task(workers.prepare(slots, "flood"))
                    await settled()
                await workers.end_round()
            assert workers.done.pop("other")[0] - sent <= 2
        while "flood" in slots._waiting or workers.encoding:
            await workers.end_round()


async def test_tenants_take_turns() -> None:
    workers, slots = Workers(), PictureSlots(lambda: 1)
    async with asyncio.TaskGroup() as tasks:
        for tenant in ("a", "a", "a", "b", "b", "c"):
            tasks.create_task(workers.prepare(slots, tenant))
        for _ in range(6):
            await workers.end_round()
    assert workers.done == {"a": [1, 3, 6], "b": [2, 5], "c": [4]}


async def test_waiting_pictures_are_bounded_in_number_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    workers, slots = Workers(), PictureSlots(lambda: 1)
    async with asyncio.TaskGroup() as tasks:
        for _ in range(1 + MAX_WAITING):
            tasks.create_task(workers.prepare(slots, "a"))
        await settled()
        with pytest.raises(NoCapacity, match="waiting already"):
            await workers.prepare(slots, "a")
        monkeypatch.setattr(picture_slots, "WAIT_S", 0.01)
        with pytest.raises(NoCapacity, match="no picture could be prepared"):
            await workers.prepare(slots, "b")
        for _ in range(1 + MAX_WAITING):
            await workers.end_round()
    assert slots._waiting == {}
    assert slots._num_taken == 0


async def test_a_picture_that_is_cancelled_frees_its_slot() -> None:
    workers, slots = Workers(), PictureSlots(lambda: 1)
    first, second = [asyncio.ensure_future(workers.prepare(slots, name)) for name in ("a", "b")]
    await settled()
    for task in (second, first):
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    workers.encoding.clear()
    third = asyncio.ensure_future(workers.prepare(slots, "c"))
    await workers.end_round()
    await third
    assert (slots._waiting, slots._num_taken) == ({}, 0)
