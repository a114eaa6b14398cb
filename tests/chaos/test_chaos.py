"""Each kind of fault is injected once while two sessions stream. The last test looks for leaks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from avatar.client import Avatar, connect
from avatar.errors import SessionNotFound, StoreUnavailable
from tests.blocks import whole_blocks
from tests.chaos.faults import FAULTS, Fault
from tests.chaos.report import MAX_UNREAD_FRAMES, RECOVERY_S
from tests.chaos.speaker import Speaker, distance, num_frames, speaking
from tests.chaos.suite import REDIS, ChaosSuite, chaos_suite
from tests.conftest import speech
from tests.services.test_suite import rendered
from tests.services.voice.fakes import spoken_by

pytestmark = pytest.mark.asyncio(loop_scope="module")

# A fault comes after two of seven blocks of three latents: the window still holds the whole session.
SECONDS, BEFORE_S = 3.0, 1.2
NUM_BLOCKS, BEFORE_BLOCKS = whole_blocks(SECONDS), whole_blocks(0.96)
OLD_S = 4.0
SEED = 7
MEMORY_BYTES = 1 << 30
# Every service and every kind of fault, in an order in which no test needs a process that is still restarting.
# The other faults are slow tests.
ONCE = [
    *(Fault("kill", "denoiser"), Fault("freeze", "vae"), Fault("swallow", "audio"), Fault("cut", "denoiser")),
    Fault("drain", "gateway"),
]
ATTACKS = [fault for fault in FAULTS if fault.is_attack]
OTHERS = [fault for fault in FAULTS if fault not in (*ONCE, *ATTACKS) and fault.service not in (REDIS, "voice")]
SENTENCES = ("Good day to you all.", "My name is Ada.", "I go on.")
VOICE = [fault for fault in FAULTS if fault.service == "voice"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def suite(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[ChaosSuite, None]:
    async with chaos_suite(checkpoint, tmp_path_factory.mktemp("chaos")) as suite:
        yield suite


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path, picture: bytes) -> Callable[[float], list[bytes]]:
    """Return a function that renders so many seconds of speech without faults."""
    return lambda seconds: rendered(checkpoint, picture, speech(seconds), SEED)


@asynccontextmanager
async def speaker_and_processes(
    suite: ChaosSuite, picture: bytes, *, seed: int = SEED, live: bool = False
) -> AsyncGenerator[tuple[Speaker, set[str]], None]:
    """Open a session's stream; yield it with the names of the processes that serve it."""
    before = await suite.active()
    async with speaking(suite.target, picture, seed=seed, live=live) as speaker:
        grown = {name for name, count in (await suite.active()).items() if count > before.get(name, 0)}
        yield speaker, grown | suite.gateways_in_use()


@pytest.mark.parametrize("kind", ["kill", pytest.param("freeze", marks=pytest.mark.slow)])
async def test_without_the_store_open_streams_continue_and_new_sessions_are_refused(
    suite: ChaosSuite, picture: bytes, undisturbed: Callable[[float], list[bytes]], kind: str
) -> None:
    await suite.until_idle()
    data, fault = speech(SECONDS), Fault(kind, REDIS)
    cut = round(len(data) * BEFORE_S / SECONDS)
    async with (
        speaker_and_processes(suite, picture, live=True) as (bystander, _),
        speaker_and_processes(suite, picture) as (speaker, _),
        connect(suite.target) as avatar,
    ):
        await speaker.say(data[:cut])
        await speaker.until(num_frames(BEFORE_BLOCKS))
        async with fault.at(suite, REDIS):
            await speaker.say(data[cut:])
            await speaker.until(num_frames(NUM_BLOCKS - 1))
            with pytest.raises(StoreUnavailable):
                await avatar.create(picture)
        await speaker.finish()
        async with asyncio.timeout(RECOVERY_S):
            while not await is_stored(avatar, bystander.session_id):  # noqa: ASYNC110
                await asyncio.sleep(0.1)  # it happens in the gateway: there is no event to wait for
        await bystander.finish()
    for session in (speaker, bystander):
        assert (session.num_lost, session.num_repeated, session.jumps) == (0, 0, [])
    assert speaker.pixels == undisturbed(SECONDS)


async def is_stored(avatar: Avatar, session_id: str) -> bool:
    """Return whether the store has the session."""
    try:
        await avatar.session(session_id)
    except (SessionNotFound, StoreUnavailable):
        return False
    return True


@pytest.mark.parametrize("fault", [*ONCE, *(pytest.param(each, marks=pytest.mark.slow) for each in OTHERS)], ids=str)
async def test_sessions_of_a_lost_process_continue_at_another_and_others_are_not_disturbed(
    suite: ChaosSuite, picture: bytes, undisturbed: Callable[[float], list[bytes]], fault: Fault
) -> None:
    await suite.until_healthy(fault.service)
    await suite.until_idle()
    data = speech(SECONDS)
    cut = round(len(data) * BEFORE_S / SECONDS)
    async with (
        speaker_and_processes(suite, picture, live=True) as (bystander, others),
        speaker_and_processes(suite, picture) as (speaker, serving),
    ):
        await speaker.say(data[:cut])
        await speaker.until(num_frames(BEFORE_BLOCKS))
        name = min(each for each in serving if each.startswith(fault.service))
        started_s = time.monotonic()
        async with fault.at(suite, name):
            if fault.kind == "drain":  # it serves its streams until it ends
                await suite.suite.processes[name].wait()
            await speaker.say(data[cut:])
            await speaker.finish()
            recovery_s = speaker.recovery_s(started_s)
            await bystander.until(len(bystander.received) + 24)
            await bystander.finish()
    for session, is_served in ((speaker, True), (bystander, name in others or fault.kind == "kill stage")):
        assert (session.num_lost, session.num_repeated) == (0, 0)
        assert len(session.jumps) == is_served
    assert recovery_s is not None
    assert recovery_s < RECOVERY_S
    print(f"{fault}: {recovery_s:.2f} s")
    if fault.service == "gateway":
        assert abs(num_frames(NUM_BLOCKS) - len(speaker.received)) <= MAX_UNREAD_FRAMES
    else:
        assert speaker.pixels == undisturbed(SECONDS)


@pytest.mark.slow
@pytest.mark.parametrize("fault", VOICE, ids=str)
async def test_text_goes_on_at_another_voice_worker(
    suite: ChaosSuite, checkpoint: Path, picture: bytes, fault: Fault
) -> None:
    await suite.until_healthy(fault.service)
    audio = await spoken_by(suite.voice_command, *SENTENCES)
    async with speaker_and_processes(suite, picture) as (speaker, _):
        await speaker.say(f"{SENTENCES[0]} ")
        await speaker.until(num_frames(1))
        name = next(name for name, count in (await suite.active()).items() if count and name.startswith("voice"))
        async with fault.at(suite, name):
            await speaker.say(" ".join(SENTENCES[1:]))
            await speaker.finish()
    assert (speaker.num_lost, speaker.num_repeated, speaker.jumps) == (0, 0, [])
    assert speaker.pixels == rendered(checkpoint, picture, audio, SEED)


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS, ids=str)
async def test_an_attack_disturbs_nobody(
    suite: ChaosSuite, picture: bytes, undisturbed: Callable[[float], list[bytes]], attack: Fault
) -> None:
    await suite.until_healthy()
    data = speech(SECONDS)
    async with (
        attack.at(suite, "gateway-0"),
        speaker_and_processes(suite, picture, live=True) as (bystander, _),
        speaker_and_processes(suite, picture) as (speaker, _),
    ):
        for start in range(0, len(data), len(data) // 10):
            await speaker.say(data[start : start + len(data) // 10])
            await asyncio.sleep(0.3)
        await speaker.finish()
        await bystander.finish()
    for session in (speaker, bystander):
        assert (session.num_lost, session.num_repeated, session.jumps) == (0, 0, [])
    assert speaker.pixels == undisturbed(SECONDS)
    await suite.until_idle()


@pytest.mark.slow
async def test_frames_of_an_old_session_stay_close_after_a_lost_level(
    suite: ChaosSuite, picture: bytes, undisturbed: Callable[[float], list[bytes]]
) -> None:
    await suite.until_healthy()
    data = speech(2 * OLD_S)
    async with speaker_and_processes(suite, picture) as (speaker, serving):
        await speaker.say(data[: len(data) // 2])
        await speaker.until(num_frames(8))
        name = min(each for each in serving if each.startswith("denoiser"))
        async with Fault("kill", "denoiser").at(suite, name):
            await speaker.say(data[len(data) // 2 :])
            await speaker.finish()
    whole, [jump] = undisturbed(2 * OLD_S), speaker.jumps
    first = [frame.index for frame in speaker.received].index(jump.index)
    assert speaker.pixels[:first] == whole[:first]
    far = distance(speaker.pixels[first:], whole[first:])
    print(f"kill denoiser of a session older than the window: relative RMS {far:.2g}")
    assert far < 1


async def test_no_stream_key_process_or_memory_leaks(suite: ChaosSuite) -> None:
    await suite.until_healthy()
    await suite.until_idle()
    assert (suite.pids - {each.pid for each in suite.suite.processes.values()}) & set(psutil.pids()) == set()
    assert {name: size for name, size in suite.memory_bytes().items() if size > MEMORY_BYTES} == {}
