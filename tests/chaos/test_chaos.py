"""Each thing that can break, broken once while two sessions speak. The last test looks at what is left."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import psutil
import pytest
import pytest_asyncio

from avatar.client import Avatar, connect
from avatar.errors import SessionNotFound, StoreUnavailable
from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import avatar_service_pb2_grpc as pb_grpc
from tests.chaos.faults import FAULTS, Fault
from tests.chaos.speaker import Speaker, distance, num_frames, speaking
from tests.chaos.suite import GATEWAYS, REDIS, Spared, spared
from tests.conftest import speech
from tests.contract.test_resume import SMALL, until_closed
from tests.product import Stub, answer, connected, new_session, opening, pieces
from tests.services.test_suite import rendered

pytestmark = pytest.mark.asyncio(loop_scope="module")

# Two of seven blocks before something breaks, so that the window still holds all of the session.
SECONDS, BEFORE_S, NUM_BLOCKS = 3.0, 1.2, 7
OLD_S = 4.0
SEED = 7
# No promise, but bounds that a busy machine keeps.
RECOVERY_S = 20.0
MEMORY_BYTES = 1 << 30
# What a gateway had sent and its client had not read is not made again.
MAX_UNREAD_FRAMES = 48
# In an order in which nobody waits for what was killed to be back.
ONCE = [
    *(Fault("kill", "audio"), Fault("kill", "denoiser"), Fault("kill", "vae"), Fault("kill", "gateway")),
    *(Fault("cut", "audio"), Fault("swallow", "denoiser"), Fault("freeze", "vae")),
    *(Fault("drain", "audio"), Fault("drain", "gateway")),
]
OTHERS = [fault for fault in FAULTS if fault not in ONCE and fault.service != REDIS]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def suite(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Spared, None]:
    async with spared(checkpoint, tmp_path_factory.mktemp("chaos")) as suite:
        yield suite


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path, picture: bytes) -> Callable[[float], list[bytes]]:
    """The frames of so many seconds that nothing has disturbed."""
    return lambda seconds: rendered(checkpoint, picture, speech(seconds), SEED)


@asynccontextmanager
async def placed(
    suite: Spared, picture: bytes, *, seed: int = SEED, live: bool = False
) -> AsyncGenerator[tuple[Speaker, set[str]], None]:
    """A session that speaks, and the names of all that it is served by."""
    before = await suite.active()
    async with speaking(suite.target, picture, seed=seed, live=live) as speaker:
        grown = {name for name, count in (await suite.active()).items() if count > before.get(name, 0)}
        yield speaker, grown | suite.gateways_in_use()


@pytest.mark.parametrize("way", ["kill", "freeze"])
async def test_without_its_store_nobody_who_is_there_notices_and_nobody_else_is_let_in(
    suite: Spared, picture: bytes, undisturbed: Callable[[float], list[bytes]], way: str
) -> None:
    await suite.until_nothing_is_left()
    data, fault = speech(SECONDS), Fault(way, REDIS)
    cut = round(len(data) * BEFORE_S / SECONDS)
    async with (
        placed(suite, picture, live=True) as (bystander, _),
        placed(suite, picture) as (speaker, _),
        connect(suite.target) as avatar,
    ):
        await speaker.say(data[:cut])
        await speaker.until(num_frames(2))
        async with fault.at(suite, REDIS):
            await speaker.say(data[cut:])
            await speaker.until(num_frames(NUM_BLOCKS - 1))
            with pytest.raises(StoreUnavailable):
                await avatar.create(picture)
        await speaker.finish()
        async with asyncio.timeout(RECOVERY_S):
            while not await knows(avatar, bystander.session_id):  # noqa: ASYNC110
                await asyncio.sleep(0.1)  # it happens in the gateway: there is no event to wait for
        await bystander.finish()
    for session in (speaker, bystander):
        assert (session.num_lost, session.num_doubled, session.jumps) == (0, 0, [])
    assert speaker.pixels == undisturbed(SECONDS)


async def knows(avatar: Avatar, session_id: str) -> bool:
    """Return whether the store has the session."""
    try:
        await avatar.session(session_id)
    except (SessionNotFound, StoreUnavailable):
        return False
    return True


async def until_lost(suite: Spared, fault: Fault, name: str) -> None:
    """Wait until nobody is served there any more, where that is not at once."""
    if fault.way == "drain":
        await suite.suite.processes[name].wait()


@pytest.mark.parametrize("fault", [*ONCE, *(pytest.param(each, marks=pytest.mark.slow) for each in OTHERS)], ids=str)
async def test_who_was_there_goes_on_elsewhere_and_nobody_else_notices(
    suite: Spared, picture: bytes, undisturbed: Callable[[float], list[bytes]], fault: Fault
) -> None:
    await suite.until_whole(fault.service)
    await suite.until_nothing_is_left()
    data = speech(SECONDS)
    cut = round(len(data) * BEFORE_S / SECONDS)
    async with (
        placed(suite, picture, live=True) as (bystander, others),
        placed(suite, picture) as (speaker, serving),
    ):
        await speaker.say(data[:cut])
        await speaker.until(num_frames(2))
        name = min(each for each in serving if each.startswith(fault.service))
        began_s = time.monotonic()
        async with fault.at(suite, name):
            await until_lost(suite, fault, name)
            await speaker.say(data[cut:])
            await speaker.finish()
            recovered_s = speaker.recovered_s(began_s)
            await bystander.until(len(bystander.seen) + 24)
            await bystander.finish()
    for session, is_there in ((speaker, True), (bystander, name in others or fault.way == "raze")):
        assert (session.num_lost, session.num_doubled) == (0, 0)
        assert len(session.jumps) == is_there
    assert recovered_s is not None
    assert recovered_s < RECOVERY_S
    print(f"{fault}: {recovered_s:.2f} s")
    if fault.service == "gateway":
        assert abs(num_frames(NUM_BLOCKS) - len(speaker.seen)) <= MAX_UNREAD_FRAMES
    else:
        assert speaker.pixels == undisturbed(SECONDS)


@pytest.mark.slow
async def test_an_old_session_comes_near_to_what_it_would_have_been(
    suite: Spared, picture: bytes, undisturbed: Callable[[float], list[bytes]]
) -> None:
    await suite.until_whole()
    data = speech(2 * OLD_S)
    async with placed(suite, picture) as (speaker, serving):
        await speaker.say(data[: len(data) // 2])
        await speaker.until(num_frames(8))
        name = min(each for each in serving if each.startswith("denoiser"))
        async with Fault("kill", "denoiser").at(suite, name):
            await speaker.say(data[len(data) // 2 :])
            await speaker.finish()
    whole, [jump] = undisturbed(2 * OLD_S), speaker.jumps
    first = [frame.index for frame in speaker.seen].index(jump.index)
    assert speaker.pixels[:first] == whole[:first]
    far = distance(speaker.pixels[first:], whole[first:])
    print(f"kill denoiser of a session older than the window: relative RMS {far:.2g}")
    assert far < 1


async def test_who_does_not_read_and_who_vanishes_is_let_go(suite: Spared, picture: bytes) -> None:
    """The second gateway waits a second for either."""
    target = suite.suite.targets[GATEWAYS[1]]
    async with connected(target) as stub, grpc.aio.insecure_channel(target, options=SMALL) as channel:
        slow: Stub = pb_grpc.AvatarServiceStub(channel)
        calls = []
        for each in (slow, stub):
            session = await new_session(stub, picture)
            call = each.StreamAvatar(timeout=60)
            await call.write(opening(session.id))
            await answer(call)
            for request in pieces(speech(SECONDS), 1 << 15):
                await call.write(request)
            calls.append((session.id, call))
        calls[1][1].cancel()
        for session_id, _ in calls:
            await until_closed(stub, session_id)
            await stub.DeleteSession(pb.DeleteSessionRequest(session_id=session_id), timeout=10)


async def test_no_stream_no_key_no_process_and_no_memory_is_left(suite: Spared) -> None:
    await suite.until_whole()
    await suite.until_nothing_is_left()
    assert (suite.pids - {each.pid for each in suite.suite.processes.values()}) & set(psutil.pids()) == set()
    assert {name: size for name, size in suite.memory_bytes().items() if size > MEMORY_BYTES} == {}
