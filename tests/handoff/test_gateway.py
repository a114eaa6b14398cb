"""Tests of a gateway over chains: the same frames, and sessions that continue at another chain after a loss."""

import signal
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from avatar.settings import GatewaySettings
from services.local.suite import gateway, workers
from tests.conftest import speech
from tests.handoff.chains import Chain, in_processes, in_this_process
from tests.product import connected, new_session, speak
from tests.services.test_recovery import YOUNG_FRAME, jumps, spoken_through
from tests.services.test_suite import SECONDS, rendered

SETTINGS = GatewaySettings(listen="127.0.0.1:0", stall_s=60.0)


@asynccontextmanager
async def gateway_over(checkpoint: Path, *chains: Chain) -> AsyncGenerator[str, None]:
    """Run a gateway over the chains, with the other workers in this process; yield its HOST:PORT."""
    store = chains[0].store
    targets = tuple(dict.fromkeys(target for chain in chains for target in chain.targets))
    async with (
        workers(checkpoint, store, SETTINGS) as given,
        gateway(store, given.model_copy(update={"denoisers": targets})) as target,
    ):
        yield target


async def test_frames_do_not_depend_on_how_latents_travel(checkpoint: Path, redis: str, picture: bytes) -> None:
    async with (
        in_this_process(checkpoint, redis) as chain,
        gateway_over(checkpoint, chain) as target,
        connected(target) as stub,
    ):
        streamed = await speak(stub, (await new_session(stub, picture, seed=7)).id, speech(SECONDS))
        assert {info.active for info in await chain.infos()} == {0}
    assert streamed.pixels == rendered(checkpoint, picture, speech(SECONDS), seed=7)
    assert [each.stage for each in streamed.closed.stages] == ["audio", "denoiser", "vae"]
    assert [each.num_blocks for each in streamed.closed.stages] == [7] * 3


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
async def test_a_session_whose_chain_is_lost_continues_at_another(
    number: signal.Signals, checkpoint: Path, redis: str, picture: bytes, tmp_path: Path
) -> None:
    data = speech(2 * SECONDS)  # longer than the chain has denoised when it is lost
    async with (
        in_processes(checkpoint, redis, tmp_path, ("0", "1,2")) as first,
        in_this_process(checkpoint, redis) as second,
        gateway_over(checkpoint, first, second) as target,
    ):
        assert first.suite
        head, tail = (first.suite.processes[levels] for levels in ("0", "1,2"))

        def lose() -> None:
            tail.send_signal(number)

        streamed = await spoken_through(target, picture, data, YOUNG_FRAME, lose)
        assert await head.wait() == 1
    whole = rendered(checkpoint, picture, data, seed=7)
    [jump] = jumps(streamed)
    assert len(streamed.pixels) == len(whole)
    assert streamed.pixels[: jump - 3] == whole[: jump - 3]
