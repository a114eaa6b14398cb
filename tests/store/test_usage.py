"""Tests of avatar.store.usage. Both kinds are held to the same facts: in memory, and in a real server."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass

import pytest

from avatar.errors import StoreUnavailable
from avatar.store.usage import MemoryTally, RedisTally, Tally

SHORT_S, LONG_S = 0.15, 60.0


@dataclass
class Kept:
    """A tally, one beside it over the same server, and a way to let seconds pass."""

    tally: Tally
    beside: Tally
    passing: Callable[[float], Awaitable[None]]


@pytest.fixture(params=["memory", "redis"])
def redis_url(request: pytest.FixtureRequest) -> str | None:
    url: str | None = request.getfixturevalue("redis") if request.param == "redis" else None
    return url


@pytest.fixture
async def kept(redis_url: str | None) -> AsyncGenerator[Kept, None]:
    if redis_url:
        tallies = RedisTally(redis_url), RedisTally(redis_url)
        yield Kept(*tallies, asyncio.sleep)
        for each in tallies:
            await each.aclose()
        return
    now = 1000.0

    async def passing(seconds: float) -> None:
        nonlocal now
        now += seconds

    tally = MemoryTally(lambda: now)
    yield Kept(tally, tally, passing)
    await tally.aclose()


@pytest.fixture
def name() -> str:
    """A name that no other test uses: the server may be shared."""
    return uuid.uuid4().hex


async def test_no_more_are_held_than_may_be(kept: Kept, name: str) -> None:
    assert await kept.tally.hold(name, "a", LONG_S, 2)
    assert await kept.beside.hold(name, "b", LONG_S, 2)
    assert not await kept.tally.hold(name, "c", LONG_S, 2)
    assert await kept.tally.hold(f"{name}/another", "c", LONG_S, 2)
    assert not await kept.tally.hold(f"{name}/none", "c", LONG_S, 0)


async def test_what_is_held_is_held_again_without_another_place(kept: Kept, name: str) -> None:
    assert await kept.tally.hold(name, "a", LONG_S, 1)
    assert await kept.beside.hold(name, "a", LONG_S, 1)
    assert not await kept.tally.hold(name, "b", LONG_S, 1)


async def test_what_is_let_go_makes_room_at_once(kept: Kept, name: str) -> None:
    assert await kept.tally.hold(name, "a", LONG_S, 1)
    await kept.tally.let_go(name, "nobody")
    assert not await kept.tally.hold(name, "b", LONG_S, 1)
    await kept.tally.let_go(name, "a")
    assert await kept.tally.hold(name, "b", LONG_S, 1)


async def test_what_nobody_holds_any_more_makes_room(kept: Kept, name: str) -> None:
    assert await kept.tally.hold(name, "dies", SHORT_S, 2)
    assert await kept.tally.hold(name, "lives", SHORT_S, 2)
    assert await kept.tally.hold(name, "lives", LONG_S, 2)
    await kept.passing(SHORT_S + 0.05)
    assert await kept.tally.hold(name, "next", LONG_S, 2)
    assert not await kept.tally.hold(name, "another", LONG_S, 2), "who held again is still there"


async def test_holding_for_less_is_less(kept: Kept, name: str) -> None:
    assert await kept.tally.hold(name, "a", LONG_S, 1)
    assert await kept.tally.hold(name, "a", SHORT_S, 1)
    await kept.passing(SHORT_S + 0.05)
    assert await kept.tally.hold(name, "b", LONG_S, 1)


async def test_without_a_limit_it_is_held_whatever_others_took(kept: Kept, name: str) -> None:
    assert await kept.tally.hold(name, "a", LONG_S, 1)
    assert await kept.tally.hold(name, "runs on", LONG_S)
    assert not await kept.tally.hold(name, "b", LONG_S, 2)


async def test_two_at_once_do_not_take_one_place(kept: Kept, name: str) -> None:
    places = [kept.tally.hold(name, str(number), LONG_S, 5) for number in range(20)]
    assert sum(await asyncio.gather(*places)) == 5


async def test_what_is_spent_adds_up_over_all(kept: Kept, name: str) -> None:
    assert await kept.tally.spend(name, 0.0, LONG_S) == 0.0
    assert await kept.tally.spend(name, 1.25, LONG_S) == 1.25
    assert await kept.beside.spend(name, 0.5, LONG_S) == 1.75
    assert await kept.tally.spend(f"{name}/another", 1.0, LONG_S) == 1.0


async def test_what_was_spent_is_forgotten(kept: Kept, name: str) -> None:
    await kept.tally.spend(name, 3.0, SHORT_S)
    await kept.passing(SHORT_S + 0.05)
    assert await kept.tally.spend(name, 1.0, LONG_S) == 1.0


async def test_a_tally_that_cannot_be_reached_says_so() -> None:
    tally = RedisTally("redis://127.0.0.1:1", timeout_s=0.2)
    for call in (tally.hold("a", "b", 1.0, 1), tally.let_go("a", "b"), tally.spend("a", 1.0, 1.0)):
        with pytest.raises(StoreUnavailable):
            await call
    await tally.aclose()


async def test_the_server_forgets_a_set_that_nobody_holds(redis: str, name: str) -> None:
    tally = RedisTally(redis)
    await tally.hold(name, "a", SHORT_S, 1)
    await tally.hold(name, "b", LONG_S)
    left_ms = await tally._redis.pttl(f"avatar:held:{{{name}}}")
    assert 0.9 * LONG_S * 1000 < left_ms <= LONG_S * 1000, "as long as the last is held"
    await tally.aclose()
