"""Tests of a gateway over chains: the same frames, and sessions that continue at another chain after a loss."""

import signal
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from avatar.settings import GatewaySettings
from services.local.processes import free_ports
from services.local.suite import gateway, workers
from tests.conftest import speech
from tests.handoff.chains import Chain, in_processes, in_this_process
from tests.product import connected, new_session, speak
from tests.services.test_recovery import YOUNG_FRAMES, half_spoken, jumps
from tests.services.test_suite import SECONDS, rendered

SETTINGS = GatewaySettings(listen="127.0.0.1:0", stall_s=60.0)


@asynccontextmanager
async def gateway_over(checkpoint: Path, chain: Chain, *spares: str) -> AsyncGenerator[str, None]:
    """Run a gateway over a chain and spare denoisers at HOST:PORT, with the other workers in this process."""
    store = chain.store
    targets = (*dict.fromkeys(chain.targets), *spares)
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
    data = speech(2 * SECONDS)
    # The spare chain starts once the session is at the other one, so that the session cannot start at the spare.
    spare = f"127.0.0.1:{free_ports(1)[0]}"
    async with AsyncExitStack() as stack:
        chain = await stack.enter_async_context(in_processes(checkpoint, redis, tmp_path, ("0", "1,2")))
        assert chain.suite
        head, tail = (chain.suite.processes[levels] for levels in ("0", "1,2"))
        target = await stack.enter_async_context(gateway_over(checkpoint, chain, spare))
        async with half_spoken(target, picture, data, YOUNG_FRAMES) as streamed:
            await stack.enter_async_context(in_this_process(checkpoint, redis, spare))
            tail.send_signal(number)
        assert await head.wait() == 1
    whole = rendered(checkpoint, picture, data, seed=7)
    [jump] = jumps(streamed)
    assert len(streamed.pixels) == len(whole)
    assert streamed.pixels[: jump - 3] == whole[: jump - 3]
