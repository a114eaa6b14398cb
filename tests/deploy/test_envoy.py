"""The router of deploy/envoy in front of two cells of stand-in workers, each with two gateways.

client -> Envoy -> Proxy -> gateway
"""

import asyncio
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from avatar.aio import background
from avatar.client import Avatar, AvatarError, Session, connect
from avatar.client.items import Frame
from avatar.errors import Draining, NotStreaming
from avatar.store.claims import Place
from avatar.store.sessions import SessionStore
from services.local.processes import Suite, free_ports
from tests.proxy import Proxy, proxied
from tests.standin import standin_gateways

CONFIG = Path(__file__).parents[2] / "deploy/envoy/envoy.yaml"
ENVOY = Path(sys.executable).parent / "envoy"
WAIT_S = 30.0
CELLS = ("east", "west")
NUM_SESSIONS = 16
# Frames that a gateway sent and its client did not read are not made again; frames that it did not record are.
MAX_UNREAD_FRAMES = 48

pytestmark = pytest.mark.slow


def config_for(port: int, admin_port: int, gateways: dict[str, list[str]]) -> str:
    """Return the configuration with other addresses. gateways: HOST:PORT of each, by cell."""
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))

    def socket_address(target: str) -> dict[str, Any]:
        host, _, number = target.rpartition(":")
        return {"socket_address": {"address": host, "port_value": int(number)}}

    config["admin"]["address"] = socket_address(f"127.0.0.1:{admin_port}")
    resources = config["static_resources"]
    resources["listeners"][0]["address"] = socket_address(f"127.0.0.1:{port}")
    for locality in resources["clusters"][0]["load_assignment"]["endpoints"]:
        targets = gateways[locality["locality"]["zone"]]
        locality["lb_endpoints"] = [{"endpoint": {"address": socket_address(each)}} for each in targets]
    text: str = yaml.safe_dump(config)
    return text


async def until(is_so: Callable[[], Awaitable[bool]]) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(WAIT_S):
        while not await is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.1)


@asynccontextmanager
async def routed(store: SessionStore, folder: Path) -> AsyncGenerator[tuple[Avatar, dict[str, list[Proxy]]], None]:
    """Two cells behind Envoy; yield a client of it, and the proxies of each cell's gateways."""
    async with AsyncExitStack() as stack:
        proxies: dict[str, list[Proxy]] = {}
        for cell in CELLS:
            cells = standin_gateways(store, {"cell": cell}, {"cell": cell}, limit=100)
            gateways = await stack.enter_async_context(cells)
            proxies[cell] = [await stack.enter_async_context(proxied(each.target)) for each in gateways]
        port, admin_port = free_ports(2)
        file = folder / "envoy.yaml"
        file.write_text(config_for(port, admin_port, {cell: [p.target for p in proxies[cell]] for cell in CELLS}))
        suite = await stack.enter_async_context(Suite(folder, "", {}))
        await suite.start("envoy", str(ENVOY), "-c", str(file), "--concurrency", "1", "--base-id", str(port))
        avatar = await stack.enter_async_context(connect(f"127.0.0.1:{port}"))

        # A gateway that the router finds later takes over calls of sessions that stream elsewhere.
        found: set[Place] = set()

        async def has_found_all() -> bool:
            with suppress(AvatarError):
                async with AsyncExitStack() as short:
                    found.add(await place(store, await opened(short, avatar)))
            return len(found) == sum(map(len, proxies.values()))

        await until(has_found_all)
        yield avatar, proxies


async def opened(stack: AsyncExitStack, avatar: Avatar) -> Session:
    """Create a session and open an offline stream of it, until the stack's end."""
    session = await avatar.create(b"picture")
    await stack.enter_async_context(session.stream())
    return session


async def place(store: SessionStore, session: Session) -> Place:
    found = (await store.status(session.id)).place
    assert found
    return found


def test_the_configuration_is_valid() -> None:
    done = subprocess.run([ENVOY, "--mode", "validate", "-c", CONFIG], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


async def test_sessions_stick_to_a_gateway_and_a_drained_cell_gets_no_new_ones(
    store: SessionStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with routed(store, tmp_path) as (avatar, _), AsyncExitStack() as stack:
        sessions: list[Session] = []
        places: list[Place] = []
        async with asyncio.timeout(WAIT_S):
            while len(sessions) < NUM_SESSIONS or len({*places}) < 4:
                sessions.append(await opened(stack, avatar))
                places.append(await place(store, sessions[-1]))

        def no_forward(*_: object) -> None:
            raise AssertionError("the router sent a call to another gateway than the session's")

        with monkeypatch.context() as patch:
            patch.setattr("services.gateway.cell.Cell.forward", no_forward)
            for session in sessions:
                await session.refresh()
                await session.interrupt()
                await session.update(prompt="")
        await store.workers("east").set_drained(is_drained=True)

        async def new_cell() -> str:
            """Return the cell of a new session's stream; nothing if it is refused because the cell is drained."""
            with suppress(Draining):
                async with AsyncExitStack() as short:
                    return (await place(store, await opened(short, avatar))).cell
            return ""

        async with asyncio.timeout(WAIT_S):
            num_west = 0  # in a row: the router sees a drain within seconds
            while num_west < NUM_SESSIONS:
                num_west = num_west + 1 if await new_cell() == "west" else 0
        for session, before in zip(sessions, places, strict=True):
            assert await place(store, session) == before, "open streams go on"
        drained = sessions[[each.cell for each in places].index("east")]
        with pytest.raises(NotStreaming) as refusal:
            await drained.interrupt()
        assert refusal.value.metadata == (await place(store, drained))._asdict()
        await store.workers("east").set_drained(is_drained=False)

        async with asyncio.timeout(WAIT_S):
            while await new_cell() != "east":
                pass


async def test_a_session_of_a_lost_cell_is_resumed_in_another(store: SessionStore, tmp_path: Path) -> None:
    async with routed(store, tmp_path) as (avatar, proxies):
        session = await avatar.create(b"picture")
        frames: list[Frame] = []
        async with session.stream() as stream:

            async def receive() -> None:
                async for frame in stream.frames():
                    frames.append(frame)

            async with background(receive()) as receiving, asyncio.timeout(WAIT_S):
                await stream.push(bytes(4 * 15360))
                while len(frames) < 12:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                lost = (await place(store, session)).cell
                for each in proxies[lost]:
                    each.leave()
                await stream.push(bytes(4 * 15360))
                await stream.close()
                await receiving
        indexes = [frame.index for frame in frames]
        assert indexes == list(range(3, 3 + len(frames)))
        assert abs(len(frames) - (8 * 12 - 3)) <= MAX_UNREAD_FRAMES
        assert any(frame.is_discontinuity for frame in frames)
