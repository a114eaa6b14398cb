"""Sessions of several gateways over many stand-in workers: where their streams open, and what a refusal costs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from unittest.mock import patch

from avatar.failover.discovery import FRESH_S
from avatar.rpc.server import serving
from avatar.runtime.device_queue import DeviceQueue
from avatar.settings import GatewaySettings
from avatar.store.registry import WorkerRegistry
from avatar.store.sessions import SessionStore
from avatar.v1 import avatar_service_pb2 as pb
from benchmarks.standin.content import NUM_LEVELS
from benchmarks.standin.service import AudioServicer, DenoiserServicer, Stage, VaeServicer
from benchmarks.standin.step import Step
from services.local.suite import gateway
from services.registration import WorkerServicer, registered
from tests.product import Stub, connected, new_session, open_stream
from tests.refusals import refused

LIVE = pb.OpenAvatar.MODE_LIVE
LIMIT_S = 20.0


class Fleet:
    """Stubs of gateways, and the workers of each stage. servers: of each worker, to stop it."""

    def __init__(self) -> None:
        self.stages: dict[str, list[Stage]] = {}
        self.stubs: list[Stub] = []
        self.servers: dict[str, list[AsyncExitStack]] = {}

    def active(self, name: str) -> list[int]:
        return [stage.admission.active for stage in self.stages[name]]

    @property
    def num_streams(self) -> int:
        return sum(sum(self.active(name)) for name in self.stages)

    @contextmanager
    def full(self, name: str) -> Iterator[None]:
        """Take all streams of a stage's workers while the body runs."""
        with ExitStack() as stack:
            for stage in self.stages[name]:
                for number in range(stage.limit):
                    stack.enter_context(stage.admission.accept(f"other-{number}", is_live=True))
            yield


def served(name: str, stage: Stage) -> WorkerServicer:
    kind, _, level = name.partition("-")
    if kind == "denoiser":
        return DenoiserServicer(stage, int(level))
    return AudioServicer(stage) if kind == "audio" else VaeServicer(stage)


@asynccontextmanager
async def fleet(
    store: SessionStore, num_gateways: int, limits: dict[str, tuple[int, int]], *, is_registered: bool = True
) -> AsyncGenerator[Fleet, None]:
    """Run a fleet while the body runs. limits: of a stage, its workers and their streams at a time; else 1 and 16."""
    found, names = Fleet(), ["audio", *(f"denoiser-{level}" for level in range(NUM_LEVELS)), "vae"]
    async with AsyncExitStack() as stack:
        queue = stack.enter_context(DeviceQueue())
        targets: dict[str, list[str]] = {}
        for name in names:
            count, limit = limits.get(name, (1, 16))
            kind = name.partition("-")[0]
            found.stages[name] = [Stage(kind, Step(0.001), queue, limit, history_blocks=3) for _ in range(count)]
            for stage in found.stages[name]:
                servicer, server = served(name, stage), AsyncExitStack()
                await stack.enter_async_context(server)
                target = f"127.0.0.1:{await server.enter_async_context(serving('127.0.0.1:0', servicer))}"
                if is_registered:
                    await server.enter_async_context(registered(store.workers("main"), target, servicer))
                targets.setdefault(kind, []).append(target)
                found.servers.setdefault(name, []).append(server)
        settings = GatewaySettings(
            listen="127.0.0.1:0",
            audio=tuple(targets["audio"]),
            denoisers=tuple(targets["denoiser"]),
            vae=tuple(targets["vae"]),
        )
        for _ in range(num_gateways):
            target = await stack.enter_async_context(gateway(store, settings))
            found.stubs.append(await stack.enter_async_context(connected(target)))
        yield found


async def test_sessions_that_gateways_open_at_once_spread_over_the_workers(store: SessionStore) -> None:
    async with fleet(store, 3, {"denoiser-1": (6, 4)}) as found:
        sessions = [(stub, await new_session(stub, b"picture")) for stub in found.stubs for _ in range(2)]
        opened = await asyncio.gather(*(open_stream(stub, session.id, mode=LIVE) for stub, session in sessions))
        assert sum(found.active("denoiser-1")) == 6
        assert max(found.active("denoiser-1")) <= 2
        for call, _ in opened:
            call.cancel()


async def test_known_full_workers_are_not_tried_and_a_free_slot_is_found(store: SessionStore) -> None:
    async with fleet(store, 2, {"denoiser-2": (3, 1)}) as found:
        sessions = [await new_session(stub, b"picture") for stub in found.stubs]
        registry = store.workers("main")
        with found.full("denoiser-2"):
            await registered_streams(registry, 3)
            for stub, session in zip(found.stubs, sessions, strict=True):
                async with refused("NO_CAPACITY"):  # the gateway may not have read the registry again yet
                    await open_stream(stub, session.id, mode=LIVE)
            admissions = [stage.admission for stages in found.stages.values() for stage in stages]
            with ExitStack() as watched:
                tries = [watched.enter_context(patch.object(each, "admit", wraps=each.admit)) for each in admissions]
                for stub, session in zip(found.stubs, sessions, strict=True):
                    async with refused("NO_CAPACITY") as refusal:
                        await open_stream(stub, session.id, mode=LIVE)
                    assert refusal.metadata == {"stage": "denoiser-2"}
                    assert 1 <= refusal.retry_s <= 3
                assert not any(each.called for each in tries)
        await registered_streams(registry, 0)
        await asyncio.sleep(FRESH_S)  # a read that is younger refuses without another
        for stub, session in zip(found.stubs, sessions, strict=True):
            call, _ = await open_stream(stub, session.id, mode=LIVE)
            call.cancel()


async def test_a_session_that_is_refused_at_one_stage_keeps_no_slot_at_others(store: SessionStore) -> None:
    """The workers are not registered, so that it is their refusal and not the gateway's."""
    async with fleet(store, 1, {"denoiser-3": (2, 1)}, is_registered=False) as found:
        session = await new_session(found.stubs[0], b"picture")
        with found.full("denoiser-3"):
            async with refused("NO_CAPACITY"):
                await open_stream(found.stubs[0], session.id, mode=LIVE)
            async with asyncio.timeout(LIMIT_S):
                while found.num_streams > 2:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        call, _ = await open_stream(found.stubs[0], session.id, mode=LIVE)
        call.cancel()


async def test_a_worker_that_stops_gets_no_further_stream(store: SessionStore) -> None:
    async with fleet(store, 1, {"denoiser-0": (2, 8)}) as found:
        sessions = [await new_session(found.stubs[0], b"picture") for _ in range(4)]
        await found.servers["denoiser-0"][0].aclose()
        calls = [(await open_stream(found.stubs[0], session.id, mode=LIVE))[0] for session in sessions]
        assert found.active("denoiser-0") == [0, 4]
        for call in calls:
            call.cancel()


async def registered_streams(registry: WorkerRegistry, count: int) -> None:
    """Wait until the registry has so many streams."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            states = (await registry.read()).workers
            if sum(state.denoiser.active for state in states) == count:
                return
            await asyncio.sleep(0.01)
