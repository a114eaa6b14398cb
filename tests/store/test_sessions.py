"""Tests of avatar.store.sessions."""

import asyncio
import math
import random
from pathlib import Path

import pytest
from redis.asyncio import Redis

from avatar.errors import ReferenceNotFound, SessionNotFound, StateCorrupt
from avatar.store.claims import Outcome
from avatar.store.sessions import SessionStore
from avatar.worker.v1 import types_pb2 as pb
from tests.store.expiry import elapse
from tests.stored import write_position

TTL_S = 60.0
KEY = "avatar:session:{a}"


def tensor(*shape: int, seed: int = 0) -> pb.Tensor:
    """A bfloat16 tensor of random bytes."""
    return pb.Tensor(dtype="bfloat16", shape=shape, data=random.Random(seed).randbytes(2 * math.prod(shape)))


def session(name: str = "a") -> pb.Session:
    return pb.Session(
        id=name,
        seed=2**63 - 1,
        reference_id="face",
        width=64,
        height=48,
        frame_rate_hz=25,
        block_frames=12,
    )


def conditions(version: int) -> pb.Conditions:
    return pb.Conditions(version=version, sink=tensor(4, 1, 3, 2, seed=version), text=tensor(0, 8))


def position(ttl_s: float = TTL_S, next_block: int = 0) -> pb.Position:
    return pb.Position(next_block=next_block, next_frame=3 + 12 * next_block, ttl_s=ttl_s)


REFERENCE = pb.Reference(
    id="face", width=64, height=48, fit="cover", motion=tensor(4, 19, 3, 2), sink=tensor(4, 1, 3, 2)
)


@pytest.fixture
async def created(store: SessionStore) -> SessionStore:
    """The session store, with session `a` in it."""
    await store.references.put(REFERENCE, TTL_S)
    await store.create(session(), conditions(0), position())
    return store


async def test_a_session_is_read_as_it_was_created(created: SessionStore) -> None:
    assert await created.session("a") == session()
    assert await created.conditions("a", 0) == conditions(0)
    assert await created.position("a") == position()


async def test_all_versions_of_the_conditions_are_kept(created: SessionStore) -> None:
    await created.put_conditions("a", conditions(1))
    await created.put_conditions("a", conditions(2))
    assert [await created.conditions("a", version) for version in range(3)] == [conditions(i) for i in range(3)]
    with pytest.raises(SessionNotFound):
        await created.conditions("a", 3)


async def test_sessions_are_independent(created: SessionStore) -> None:
    await created.create(session("b"), conditions(0), position())
    await created.put_conditions("b", conditions(1))
    await created.delete("b")
    assert await created.session("a") == session()
    with pytest.raises(SessionNotFound):
        await created.conditions("a", 1)


async def test_a_session_expires_as_a_whole(created: SessionStore, redis_client: Redis) -> None:
    await elapse(redis_client, TTL_S)
    for read in (created.session("a"), created.position("a"), created.conditions("a", 0)):
        with pytest.raises(SessionNotFound, match=r"'a'.*never created, was deleted or has expired"):
            await read
    with pytest.raises(SessionNotFound):
        await created.status("a")


async def test_renewing_restarts_the_time_to_live_of_the_whole_session(
    created: SessionStore, redis_client: Redis
) -> None:
    await created.put_conditions("a", conditions(1))
    await elapse(redis_client, TTL_S - 10)
    await created.set_ttl("a", 90.0)
    await elapse(redis_client, 10)
    await write_position(created, "a", position(next_block=5, ttl_s=1.0))
    assert 89 < (await created.status("a")).expires_in_s <= 90
    assert await created.session("a") == session()
    assert [await created.conditions("a", version) for version in range(2)] == [conditions(i) for i in range(2)]
    assert await created.position("a") == position(next_block=5, ttl_s=90.0)


async def test_new_conditions_do_not_extend_the_time_to_live(created: SessionStore, redis_client: Redis) -> None:
    await elapse(redis_client, 30)
    await created.put_conditions("a", conditions(1))
    assert (await created.status("a")).expires_in_s <= TTL_S - 30


async def test_writing_to_a_missing_session_creates_nothing(store: SessionStore, redis_client: Redis) -> None:
    with pytest.raises(SessionNotFound):
        await store.put_conditions("a", conditions(1))
    with pytest.raises(SessionNotFound):
        await store.set_ttl("a", TTL_S)
    with pytest.raises(SessionNotFound):
        await store.put_prompt(session(), conditions(1))
    with pytest.raises(SessionNotFound):
        await store.put_idle_prompt(session(), conditions(1), position(), position(), 0)
    assert await redis_client.keys() == []


async def test_a_session_has_the_sink_of_its_reference(created: SessionStore) -> None:
    await created.put_conditions("a", pb.Conditions(version=1, text=tensor(0, 8)))
    assert (await created.conditions("a", 1)).sink == REFERENCE.sink


async def test_a_session_without_its_latents_does_not_exist(created: SessionStore, redis_client: Redis) -> None:
    await created.put_conditions("a", pb.Conditions(version=1))
    await redis_client.delete("avatar:latents:{face}")
    with pytest.raises(SessionNotFound):
        await created.conditions("a", 1)
    with pytest.raises(ReferenceNotFound, match="'face'"):
        await created.create(session("b"), conditions(0), position())


async def test_a_prompt_of_an_idle_session_is_written_only_where_it_was_read(created: SessionStore) -> None:
    prompted, before, after = session(), position(), position()
    prompted.prompt, after.conditions = "a person who smiles", 1
    outcome = await created.put_idle_prompt(prompted, conditions(1), before, after, 0)
    assert outcome is Outcome.DONE
    assert (await created.session("a")).prompt == prompted.prompt
    assert (await created.position("a")).conditions == 1
    with pytest.raises(SessionNotFound):
        await created.conditions("a", 0)
    assert await created.put_idle_prompt(session(), conditions(1), before, after, 0) is Outcome.CHANGED
    await created.claim("a").acquire()
    assert await created.put_idle_prompt(session(), conditions(2), after, after, 1) is Outcome.TAKEN
    assert (await created.session("a")).prompt == prompted.prompt


async def test_a_deleted_session_does_not_exist(created: SessionStore) -> None:
    await created.delete("a")
    with pytest.raises(SessionNotFound):
        await created.session("a")
    with pytest.raises(SessionNotFound):
        await created.delete("a")


async def test_creating_a_session_again_replaces_it(created: SessionStore) -> None:
    await created.put_conditions("a", conditions(1))
    await created.create(session(), conditions(0), position())
    with pytest.raises(SessionNotFound):
        await created.conditions("a", 1)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        pytest.param(b"", "version byte", id="empty"),
        pytest.param(b"\x02rest", "version byte", id="another version"),
        pytest.param(b'{"id": "a"}', "version byte", id="json"),
        pytest.param(b"\x01", "damaged", id="a version alone"),
        pytest.param(b"\x01" + b"\xff" * 40, "damaged", id="junk"),
    ],
)
async def test_a_foreign_value_is_refused(created: SessionStore, redis_client: Redis, value: bytes, words: str) -> None:
    for field, read in (
        ("session", created.session("a")),
        ("position", created.position("a")),
        ("conditions/0", created.conditions("a", 0)),
    ):
        await redis_client.hset(KEY, field, value)
        with pytest.raises(StateCorrupt, match=f"{field} of session 'a'.*{words}"):
            await read


async def test_a_damaged_value_or_one_of_another_kind_is_refused(created: SessionStore, redis_client: Redis) -> None:
    whole, other = await redis_client.hmget(KEY, ["conditions/0", "position"])
    assert isinstance(whole, bytes)
    assert isinstance(other, bytes)
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :]
    for value in (other, flipped, *(whole[:length] for length in range(len(whole)))):
        await redis_client.hset(KEY, "conditions/0", value)
        with pytest.raises(StateCorrupt):
            await created.conditions("a", 0)


async def test_a_pickle_is_refused_and_never_unpickled(
    created: SessionStore, redis_client: Redis, pickled: tuple[bytes, Path]
) -> None:
    value, unpickled = pickled
    for each in (value, b"\x01" + value):
        await redis_client.hset(KEY, "session", each)
        with pytest.raises(StateCorrupt):
            await created.session("a")
    assert not unpickled.exists()


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(pb.Tensor(dtype="float32", shape=[2, 3], data=bytes(23)), id="a byte less"),
        pytest.param(pb.Tensor(dtype="float32", shape=[2, 3], data=bytes(25)), id="a byte more"),
        pytest.param(pb.Tensor(dtype="float32", shape=[], data=b""), id="no number for a scalar"),
        pytest.param(pb.Tensor(dtype="float64", shape=[2], data=bytes(16)), id="an unsupported dtype"),
        pytest.param(pb.Tensor(shape=[2], data=bytes(8)), id="no dtype"),
    ],
)
async def test_a_tensor_that_does_not_fill_its_shape_is_refused(created: SessionStore, broken: pb.Tensor) -> None:
    await created.put_conditions("a", pb.Conditions(version=1, sink=broken))
    with pytest.raises(StateCorrupt, match="sink of conditions/1 of session 'a' does not fill its shape"):
        await created.conditions("a", 1)
    await created.references.put(pb.Reference(id="face", motion=broken), TTL_S)
    with pytest.raises(StateCorrupt, match="motion of reference does not fill its shape"):
        await created.references.latents("face")


async def test_the_store_stays_usable_after_a_cancelled_call(created: SessionStore) -> None:
    for steps in range(60):
        reading = asyncio.ensure_future(created.session("a"))
        for _ in range(steps % 12):
            await asyncio.sleep(0)
        if reading.cancel():
            with pytest.raises(asyncio.CancelledError):
                await reading
    assert await created.session("a") == session()


async def test_the_store_never_swallows_a_cancellation(created: SessionStore) -> None:
    claim = created.claim("a")

    async def acquire_repeatedly() -> None:
        while True:
            await claim.acquire()
            await asyncio.sleep(0)

    for pauses in range(200):
        task = asyncio.ensure_future(acquire_repeatedly())
        for _ in range(10 + pauses % 13):
            await asyncio.sleep(0)
        task.cancel()
        _, waiting = await asyncio.wait({task}, timeout=1)
        assert not waiting
