"""Tests of avatar.handoff: a chain of denoisers as one stage, and the loss of one of its processes."""

import asyncio
import signal
import time
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
import pytest_asyncio

from avatar.errors import StageLost
from avatar.rpc.codec import block_to_wire, conditions_to_pb
from avatar.rpc.wire import RelayedBlock
from avatar.worker.v1 import types_pb2 as pb
from tests.handoff.chains import (
    NUM_BLOCKS,
    Chain,
    blocks_of,
    denoised_by,
    denoised_locally,
    first_conditions,
    in_processes,
    in_this_process,
    random_session,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")
EACH = ("0", "1", "2")
SHARES = ("0", "1,2")
# A loss is noticed within 5 s, and the other processes drain for 5 s at most; the machine may be busy.
ALL_GONE_S = 30.0


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["one process", "two processes"])
async def chain(
    request: pytest.FixtureRequest, checkpoint: Path, redis_server: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncGenerator[Chain, None]:
    """A running chain. The last test of the module breaks it."""
    if request.param == "one process":
        async with in_this_process(checkpoint, redis_server) as chain:
            yield chain
    else:
        async with in_processes(checkpoint, redis_server, tmp_path_factory.mktemp("chain"), SHARES) as chain:
            yield chain


async def first_blocks(
    checkpoint: Path, count: int, end: BaseException | None = None
) -> AsyncGenerator[pb.Block, None]:
    """Yield a few blocks, then raise the error, or wait for ever without one."""
    session = random_session("", 9)
    for block in blocks_of(session, checkpoint)[:count]:
        message = block_to_wire(block).to_pb()
        if block.index == 0:
            message.carried.CopyFrom(conditions_to_pb(first_conditions(session)))
        yield message
    if end:
        raise end
    await asyncio.Event().wait()


async def rest(answers: AsyncGenerator[RelayedBlock, None]) -> list[RelayedBlock]:
    return [each async for each in answers]


async def test_remote_equals_local(chain: Chain, checkpoint: Path) -> None:
    session = random_session("alone", 1)
    stage = await chain.stage(session)
    assert await denoised_by(stage, checkpoint, session) == denoised_locally(checkpoint, session)
    assert stage.closed.num_blocks == NUM_BLOCKS
    assert stage.closed.busy_s > 0


async def test_interleaved_equals_alone(chain: Chain, checkpoint: Path) -> None:
    sessions = [random_session(f"one of {seed}", seed) for seed in range(2, 6)]
    stages = [await chain.stage(session) for session in sessions]
    made = await asyncio.gather(
        *(denoised_by(stage, checkpoint, session) for stage, session in zip(stages, sessions, strict=True))
    )
    assert made == [denoised_locally(checkpoint, session) for session in sessions]


async def test_a_reopened_session_receives_no_latents_of_its_earlier_streams(chain: Chain, checkpoint: Path) -> None:
    session = random_session("again", 6)
    stages = [await chain.stage(session) for _ in range(3)]
    before = [stage(first_blocks(checkpoint, 3)) for stage in stages[:2]]
    for answers in before:
        await anext(answers)
    await before[0].aclose()
    assert await denoised_by(stages[2], checkpoint, session) == denoised_locally(checkpoint, session)
    await before[1].aclose()


async def test_closing_a_stream_frees_state(chain: Chain, checkpoint: Path) -> None:
    stage = await chain.stage(random_session("closed", 7))
    answers = stage(first_blocks(checkpoint, 2))
    await anext(answers)
    assert all(info.active for info in await chain.infos())
    await answers.aclose()
    async with asyncio.timeout(5):
        while {info.active for info in await chain.infos()} != {0}:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_an_error_of_the_blocks_is_raised(chain: Chain, checkpoint: Path) -> None:
    stage = await chain.stage(random_session("failing", 8))
    with pytest.raises(LookupError, match="the audio is gone"):
        await rest(stage(first_blocks(checkpoint, 2, LookupError("the audio is gone"))))


async def test_workers_of_a_chain_report_one_name(chain: Chain) -> None:
    infos = await chain.infos()
    assert len({info.chain for info in infos}) == 1
    assert all(info.chain for info in infos)


@pytest.mark.parametrize("chain", ["two processes"], indirect=True)  # one process has no neighbour
async def test_a_neighbour_that_stops_for_a_while_mixes_up_no_sessions(chain: Chain, checkpoint: Path) -> None:
    sessions = [random_session(f"slow {seed}", seed) for seed in (10, 11)]
    stages = [await chain.stage(session) for session in sessions]

    async def stop_for_a_while() -> None:
        assert chain.suite is not None
        chain.suite.processes["1,2"].send_signal(signal.SIGSTOP)
        await asyncio.sleep(1.5)
        chain.suite.processes["1,2"].send_signal(signal.SIGCONT)

    *made, _ = await asyncio.gather(
        *(denoised_by(stage, checkpoint, each, 0.02) for stage, each in zip(stages, sessions, strict=True)),
        stop_for_a_while(),
    )
    assert made == [denoised_locally(checkpoint, session) for session in sessions]


@pytest.mark.parametrize("chain", ["two processes"], indirect=True)  # one process has no neighbour
async def test_a_killed_rank_ends_streams_and_every_process(chain: Chain, checkpoint: Path) -> None:
    await lose(chain, checkpoint, "0", signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("lost", EACH)
async def test_a_rank_lost_in_any_way_leaves_nothing_hanging(
    number: signal.Signals, lost: str, checkpoint: Path, redis: str, tmp_path: Path
) -> None:
    async with in_processes(checkpoint, redis, tmp_path, EACH) as chain:
        await lose(chain, checkpoint, lost, number)


async def lose(chain: Chain, checkpoint: Path, lost: str, number: signal.Signals) -> None:
    """Lose a rank in the middle of a session: the stream ends as lost, and all other processes exit with status 1."""
    assert chain.suite is not None
    stage = await chain.stage(random_session("lost", 12))
    answers = stage(first_blocks(checkpoint, NUM_BLOCKS))
    await anext(answers)
    processes = dict(chain.suite.processes)
    processes[lost].send_signal(number)
    started = time.monotonic()
    async with asyncio.timeout(ALL_GONE_S):
        with pytest.raises(StageLost):
            await rest(answers)
    raised_s = time.monotonic() - started
    gone = processes.pop(lost)
    async with asyncio.timeout(ALL_GONE_S - raised_s):
        assert await asyncio.gather(*(each.wait() for each in processes.values())) == [1] * len(processes)
    print(f"{number.name} of {lost}: raised after {raised_s:.2f} s, all gone after {time.monotonic() - started:.2f} s")
    if number is signal.SIGSTOP:
        gone.send_signal(signal.SIGCONT)  # it notices that the others are gone
    status = {signal.SIGKILL: -signal.SIGKILL, signal.SIGSTOP: 1, signal.SIGTERM: 0}[number]
    assert await asyncio.wait_for(gone.wait(), ALL_GONE_S) == status
