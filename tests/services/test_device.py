"""Tests of services.device: several workers in one process, at one address and on one queue."""

import asyncio
import sys
from pathlib import Path

import pytest

from avatar import telemetry
from avatar.aio import background
from avatar.settings import GatewaySettings
from avatar.store.sessions import SessionStore
from avatar.worker.v1.discovery_pb2 import WorkerState
from services import device
from services.local.processes import free_ports
from services.local.suite import gateway
from services.process import run
from tests.conftest import speech
from tests.product import connected, new_session, speak
from tests.services.test_suite import rendered

LIMIT_S = 60.0


async def registered(store: SessionStore, count: int) -> list[WorkerState]:
    """Return the states of the registered workers once there are so many."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            states = (await store.workers("main").read()).workers
            if len(states) == count:
                return [*states]
            await asyncio.sleep(0.01)


@pytest.fixture
def address(checkpoint: Path, redis: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """HOST:PORT of the environment's settings."""
    monkeypatch.setattr(telemetry, "set_up", lambda *_: None)  # it is set up once per process
    address = f"127.0.0.1:{free_ports(1)[0]}"
    for name, value in {"CHECKPOINT": str(checkpoint), "LISTEN": address, "REDIS_URL": redis}.items():
        monkeypatch.setenv(f"AVATAR_{name}", value)
    return address


async def test_workers_of_one_process_serve_at_one_address_and_share_its_queue(
    address: str, checkpoint: Path, store: SessionStore, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses, stopped = (address,), asyncio.Event()
    monkeypatch.setattr(device, "until_stopped", stopped.wait)
    settings = GatewaySettings(listen="127.0.0.1:0", audio=addresses, denoisers=addresses, vae=addresses)
    async with background(device.main(["audio", "denoiser", "vae", "audio"])) as running:
        states = await registered(store, 3)
        assert {state.address for state in states} == {address}
        loads = [getattr(state, str(state.WhichOneof("info"))).load for state in states]
        assert len({load.queue for load in loads}) == 1
        async with gateway(store, settings) as target, connected(target) as stub:
            session = await new_session(stub, picture, seed=7)
            streamed = await speak(stub, session.id, speech(1))
        stopped.set()
        await running
    assert not (await store.workers("main").read()).workers
    assert streamed.pixels == rendered(checkpoint, picture, speech(1), seed=7)


async def test_a_chain_needs_processes_of_its_own(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVATAR_CHAIN", address)
    with pytest.raises(ValueError, match=r"AVATAR_CHAIN needs .*: python -m services.denoiser"):
        await device.main(["denoiser"])


@pytest.mark.parametrize(("arguments", "words"), [([], "required: SERVICE"), (["gateway"], "choice: 'gateway'")])
def test_the_command_names_known_services(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["device", *arguments])
    with pytest.raises(SystemExit) as ended:
        run(device.main, device.SERVICES)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
