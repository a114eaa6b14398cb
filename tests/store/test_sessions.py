"""Tests of avatar.store.sessions. Both kinds of store are held to the same facts: in memory, and in a real server."""

import asyncio
import math
import random
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from avatar.errors import ReferenceNotFound, SessionBusy, SessionNotFound, StateCorrupt
from avatar.store.redis import Hashes, MemoryHashes, RedisHashes
from avatar.store.sessions import SessionStore
from avatar.worker.v1 import types_pb2 as pb

LONG_S = 60.0


@dataclass
class Kept:
    """A store, what it lies on, and a way to let seconds pass."""

    store: SessionStore
    hashes: Hashes
    passing: Callable[[float], Awaitable[None]]


@dataclass
class Clock:
    """Shows what it was set to."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now

    async def passing(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(params=["memory", "redis"])
def redis_url(request: pytest.FixtureRequest) -> str | None:
    url: str | None = request.getfixturevalue("redis") if request.param == "redis" else None
    return url


@pytest.fixture
async def kept(redis_url: str | None) -> AsyncGenerator[Kept, None]:
    clock = Clock()
    hashes: Hashes = RedisHashes(redis_url) if redis_url else MemoryHashes(clock)
    store = SessionStore(hashes)
    yield Kept(store, hashes, asyncio.sleep if redis_url else clock.passing)
    await store.aclose()


@pytest.fixture
def name() -> str:
    """An id that no other test uses: the server may be shared."""
    return uuid.uuid4().hex


def tensor(*shape: int, seed: int = 0) -> pb.Tensor:
    """A bfloat16 tensor of random bytes."""
    return pb.Tensor(dtype="bfloat16", shape=shape, data=random.Random(seed).randbytes(2 * math.prod(shape)))


def session(name: str) -> pb.Session:
    return pb.Session(
        id=name,
        seed=2**63 - 1,
        reference_id="face",
        width=64,
        height=48,
        motion=tensor(4, 19, 3, 2),
        frame_rate_hz=25,
        block_frames=12,
    )


def conditions(version: int) -> pb.Conditions:
    return pb.Conditions(version=version, sink=tensor(4, 1, 3, 2, seed=version), text=tensor(0, 8))


def position(ttl_s: float = LONG_S, next_block: int = 0) -> pb.Position:
    return pb.Position(next_block=next_block, next_frame=3 + 12 * next_block, ttl_s=ttl_s)


def reference(name: str) -> pb.Reference:
    return pb.Reference(id=name, width=64, height=48, fit="cover", motion=tensor(4, 19, 3, 2), sink=tensor(4, 1, 3, 2))


def key(name: str) -> str:
    return f"avatar:session:{{{name}}}"


async def test_a_session_is_read_as_it_was_created(kept: Kept, name: str) -> None:
    await kept.store.create(session(name), conditions(0), position())
    assert await kept.store.session(name) == session(name)
    assert await kept.store.conditions(name, 0) == conditions(0)
    assert await kept.store.position(name) == position()


async def test_versions_of_the_conditions_stand_beside_each_other(kept: Kept, name: str) -> None:
    await kept.store.create(session(name), conditions(0), position())
    await kept.store.put_conditions(name, conditions(1))
    await kept.store.put_conditions(name, conditions(2))
    assert [await kept.store.conditions(name, version) for version in range(3)] == [conditions(i) for i in range(3)]
    with pytest.raises(SessionNotFound):
        await kept.store.conditions(name, 3)


async def test_sessions_do_not_touch(kept: Kept, name: str) -> None:
    other = name + "-other"
    await kept.store.create(session(name), conditions(0), position())
    await kept.store.create(session(other), conditions(0), position())
    await kept.store.put_conditions(other, conditions(1))
    await kept.store.delete(other)
    assert await kept.store.session(name) == session(name)
    with pytest.raises(SessionNotFound):
        await kept.store.conditions(name, 1)


async def test_a_session_nobody_renews_is_forgotten_whole(kept: Kept, name: str) -> None:
    await kept.store.create(session(name), conditions(0), position(ttl_s=0.2))
    await kept.passing(0.3)
    for read in (kept.store.session(name), kept.store.position(name), kept.store.conditions(name, 0)):
        with pytest.raises(SessionNotFound, match=f"'{name}'.*never created, was deleted or has expired"):
            await read
    with pytest.raises(SessionNotFound):
        await kept.store.expires_in_s(name)


async def test_a_blocks_renewal_keeps_all_of_the_session(kept: Kept, name: str) -> None:
    await kept.store.create(session(name), conditions(0), position(ttl_s=1.0))
    await kept.store.put_conditions(name, conditions(1))
    await kept.store.renew(name, position(next_block=5))
    await kept.passing(1.1)
    assert await kept.store.session(name) == session(name)
    assert await kept.store.conditions(name, 0) == conditions(0)
    assert await kept.store.conditions(name, 1) == conditions(1)
    assert await kept.store.position(name) == position(next_block=5)


async def test_conditions_do_not_prolong_a_session(kept: Kept, name: str) -> None:
    await kept.store.create(session(name), conditions(0), position(ttl_s=30.0))
    await kept.store.put_conditions(name, conditions(1))
    assert 29 < await kept.store.expires_in_s(name) <= 30


async def test_renewing_starts_the_time_to_live_anew(kept: Kept, name: str) -> None:
    await kept.store.create(session(name), conditions(0), position(ttl_s=30.0))
    assert 29 < await kept.store.expires_in_s(name) <= 30
    await kept.store.renew(name, position(ttl_s=90.0))
    assert 89 < await kept.store.expires_in_s(name) <= 90


async def test_writing_to_a_session_that_is_gone_leaves_nothing_behind(kept: Kept, name: str) -> None:
    with pytest.raises(SessionNotFound):
        await kept.store.put_conditions(name, conditions(1))
    with pytest.raises(SessionNotFound):
        await kept.store.renew(name, position())
    assert await kept.hashes.read(key(name), "conditions/1") is None
    assert await kept.hashes.read(key(name), "position") is None
    assert not await kept.hashes.delete(key(name))


async def test_a_deleted_session_is_gone(kept: Kept, name: str) -> None:
    await kept.store.create(session(name), conditions(0), position())
    await kept.store.delete(name)
    with pytest.raises(SessionNotFound):
        await kept.store.session(name)
    with pytest.raises(SessionNotFound):
        await kept.store.delete(name)


async def test_creating_again_begins_anew(kept: Kept, name: str) -> None:
    await kept.store.create(session(name), conditions(0), position())
    await kept.store.put_conditions(name, conditions(1))
    await kept.store.create(session(name), conditions(0), position())
    with pytest.raises(SessionNotFound):
        await kept.store.conditions(name, 1)


async def test_a_reference_is_kept_under_its_name_for_its_time(kept: Kept, name: str) -> None:
    await kept.store.put_reference(reference(name), 30.0)
    assert await kept.store.reference(name) == reference(name)
    assert 29 < await kept.store.reference_expires_in_s(name) <= 30
    await kept.store.put_reference(reference(name), 0.2)
    await kept.passing(0.3)
    assert await kept.store.reference_expires_in_s(name) == 0
    with pytest.raises(ReferenceNotFound, match=f"no reference '{name}'"):
        await kept.store.reference(name)


async def test_a_deleted_reference_is_gone_and_a_session_of_that_name_is_not(kept: Kept, name: str) -> None:
    await kept.store.create(session(name), conditions(0), position())
    await kept.store.put_reference(reference(name), LONG_S)
    await kept.store.delete_reference(name)
    with pytest.raises(ReferenceNotFound):
        await kept.store.reference(name)
    with pytest.raises(ReferenceNotFound):
        await kept.store.delete_reference(name)
    assert await kept.store.session(name) == session(name)


async def test_a_session_has_one_owner_at_a_time(kept: Kept, name: str) -> None:
    assert not await kept.store.is_claimed(name)
    await kept.store.claim(name, "one")
    await kept.store.claim(name, "one")
    with pytest.raises(SessionBusy, match=f"'{name}'"):
        await kept.store.claim(name, "other")
    assert await kept.store.is_claimed(name)


async def test_who_keeps_a_session_writes_how_far_it_is_and_stays_its_owner(
    kept: Kept, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avatar.store.sessions.CLAIM_TTL_S", 1.0)
    await kept.store.create(session(name), conditions(0), position())
    await kept.store.claim(name, "one")
    for block in (3, 4):
        await kept.passing(0.6)
        assert await kept.store.keep(name, "one", position(next_block=block))
    assert await kept.store.position(name) == position(next_block=4)
    await kept.passing(0.6)
    assert await kept.store.is_claimed(name)


async def test_who_keeps_a_session_renews_it_only_with_a_position(kept: Kept, name: str) -> None:
    await kept.store.create(session(name), conditions(0), position(ttl_s=10.0))
    await kept.store.claim(name, "one")
    for renewed, is_longer in ((None, False), (position(ttl_s=90.0), True)):
        await kept.store.keep(name, "one", renewed)
        assert (await kept.store.expires_in_s(name) > 10.0) == is_longer


async def test_what_another_stream_owns_is_not_written(kept: Kept, name: str) -> None:
    await kept.store.create(session(name), conditions(0), position())
    await kept.store.claim(name, "one")
    await kept.store.claim(name, "other", takes_over=True)
    with pytest.raises(SessionBusy, match=f"'{name}'"):
        await kept.store.keep(name, "one", position(next_block=5))
    assert await kept.store.position(name) == position()


async def test_a_session_that_is_deleted_is_told_from_a_store_that_was_emptied(kept: Kept, name: str) -> None:
    await kept.store.create(session(name), conditions(0), position())
    await kept.store.claim(name, "one")
    await kept.store.delete(name)
    with pytest.raises(SessionNotFound, match=f"'{name}'"):
        await kept.store.keep(name, "one", position())
    await kept.store.release(name, "one")
    assert not await kept.store.keep(name, "one", position())
    with pytest.raises(SessionNotFound):
        await kept.store.position(name)


async def test_only_the_owner_releases(kept: Kept, name: str) -> None:
    await kept.store.claim(name, "one")
    await kept.store.release(name, "other")
    with pytest.raises(SessionBusy):
        await kept.store.claim(name, "other")
    await kept.store.release(name, "one")
    assert not await kept.store.is_claimed(name)
    await kept.store.claim(name, "other")


async def test_a_claim_lives_as_long_as_its_owner_renews_it(
    kept: Kept, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avatar.store.sessions.CLAIM_TTL_S", 1.0)
    await kept.store.claim(name, "one")
    await kept.passing(0.6)
    await kept.store.claim(name, "one")
    await kept.passing(0.6)
    with pytest.raises(SessionBusy):
        await kept.store.claim(name, "other")
    await kept.passing(0.6)
    await kept.store.claim(name, "other")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        pytest.param(b"", "version byte", id="nothing"),
        pytest.param(b"\x02rest", "version byte", id="another version"),
        pytest.param(b'{"id": "a"}', "version byte", id="json"),
        pytest.param(b"\x01", "damaged", id="a version alone"),
        pytest.param(b"\x01" + b"\xff" * 40, "damaged", id="junk"),
    ],
)
async def test_a_foreign_value_is_refused(kept: Kept, name: str, value: bytes, words: str) -> None:
    await kept.store.create(session(name), conditions(0), position())
    for field in ("session", "position", "conditions/0"):
        await kept.hashes.update(key(name), {field: value}, None)
    for field, read in (
        ("session", kept.store.session(name)),
        ("position", kept.store.position(name)),
        ("conditions/0", kept.store.conditions(name, 0)),
    ):
        with pytest.raises(StateCorrupt, match=f"{field} of session '{name}'.*{words}"):
            await read


async def test_random_bytes_are_refused(kept: Kept, name: str) -> None:
    draw = random.Random(0)
    await kept.store.create(session(name), conditions(0), position())
    for _ in range(200):
        await kept.hashes.update(key(name), {"session": b"\x01" + draw.randbytes(draw.randrange(24))}, None)
        with pytest.raises(StateCorrupt):
            await kept.store.session(name)


async def test_a_value_cut_short_is_refused_wherever_it_is_cut(kept: Kept, name: str) -> None:
    await kept.store.create(session(name), conditions(0), position())
    whole = await kept.hashes.read(key(name), "conditions/0")
    assert whole is not None
    for length in range(len(whole)):
        await kept.hashes.update(key(name), {"conditions/0": whole[:length]}, None)
        with pytest.raises(StateCorrupt):
            await kept.store.conditions(name, 0)


async def test_a_flipped_bit_is_noticed(kept: Kept, name: str) -> None:
    await kept.store.create(session(name), conditions(0), position())
    whole = await kept.hashes.read(key(name), "session")
    assert whole is not None
    damaged = bytearray(whole)
    damaged[len(damaged) // 2] ^= 4
    await kept.hashes.update(key(name), {"session": bytes(damaged)}, None)
    with pytest.raises(StateCorrupt, match="damaged"):
        await kept.store.session(name)


async def test_a_value_of_another_kind_is_refused(kept: Kept, name: str) -> None:
    await kept.store.create(session(name), conditions(0), position())
    other = await kept.hashes.read(key(name), "position")
    assert other is not None
    await kept.hashes.update(key(name), {"conditions/0": other}, None)
    with pytest.raises(StateCorrupt, match="Conditions"):
        await kept.store.conditions(name, 0)


async def test_a_pickle_is_refused_and_never_unpickled(kept: Kept, name: str, pickled: tuple[bytes, Path]) -> None:
    value, unpickled = pickled
    await kept.store.create(session(name), conditions(0), position())
    for each in (value, b"\x01" + value):
        await kept.hashes.update(key(name), {"session": each}, None)
        with pytest.raises(StateCorrupt):
            await kept.store.session(name)
    assert not unpickled.exists()


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(pb.Tensor(dtype="float32", shape=[2, 3], data=bytes(23)), id="a byte less"),
        pytest.param(pb.Tensor(dtype="float32", shape=[2, 3], data=bytes(25)), id="a byte more"),
        pytest.param(pb.Tensor(dtype="float32", shape=[], data=b""), id="no number for a scalar"),
        pytest.param(pb.Tensor(dtype="float64", shape=[2], data=bytes(16)), id="a dtype we do not keep"),
        pytest.param(pb.Tensor(shape=[2], data=bytes(8)), id="no dtype"),
    ],
)
async def test_numbers_that_do_not_fill_their_shape_are_refused(kept: Kept, name: str, broken: pb.Tensor) -> None:
    await kept.store.create(session(name), conditions(0), position())
    await kept.store.put_conditions(name, pb.Conditions(version=1, sink=broken))
    with pytest.raises(StateCorrupt, match=f"sink of conditions/1 of session '{name}' does not fill its shape"):
        await kept.store.conditions(name, 1)
    await kept.store.put_reference(pb.Reference(id=name, motion=broken), LONG_S)
    with pytest.raises(StateCorrupt, match="motion of reference does not fill its shape"):
        await kept.store.reference(name)


async def test_a_cancellation_is_not_swallowed_and_leaves_the_store_usable(kept: Kept, name: str) -> None:
    await kept.store.create(session(name), conditions(0), position())
    for steps in range(60):
        reading = asyncio.ensure_future(kept.store.session(name))
        for _ in range(steps % 12):
            await asyncio.sleep(0)
        if reading.cancel():
            with pytest.raises(asyncio.CancelledError):
                await reading
    assert await kept.store.session(name) == session(name)


async def test_a_cancellation_is_never_lost_in_the_store(kept: Kept, name: str) -> None:
    async def claiming() -> None:
        while True:
            await kept.store.claim(name, "owner")
            await asyncio.sleep(0)

    for pauses in range(200):
        task = asyncio.ensure_future(claiming())
        for _ in range(10 + pauses % 13):
            await asyncio.sleep(0)
        task.cancel()
        _, waiting = await asyncio.wait({task}, timeout=1)
        assert not waiting, "the store swallowed a cancellation"
