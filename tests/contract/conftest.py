"""Contract tests run against any gateway: `pytest tests/contract --target HOST:PORT`; else against one of their own."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

from avatar.settings import GatewaySettings
from avatar.store.redis import RedisHashes
from avatar.store.sessions import SessionStore
from avatar.v1 import avatar_service_pb2 as pb
from services.local.suite import gateway as run_gateway
from services.local.suite import workers
from tests.conftest import ASSETS
from tests.contract.tenants import ACME, GLOBEX, TenantGateway, gateway_with_tenants
from tests.product import Stub, connected

WAIT_S = 30.0


@pytest.fixture(scope="session")
def shared_workers(checkpoint: Path, redis_server: str) -> Iterator[GatewaySettings]:
    """Settings of a gateway over workers that all contract tests of this process share, in a thread of their own."""
    settings, stop, thread = Future[GatewaySettings](), Event(), ThreadPoolExecutor(1)

    async def serve() -> None:
        store = SessionStore(RedisHashes(redis_server))
        # A cell of their own: they are registered while later tests of this process read the registry of `main`.
        own = GatewaySettings(listen="127.0.0.1:0", cell="contract")
        async with workers(checkpoint, store, own) as given:
            settings.set_result(given)
            await asyncio.to_thread(stop.wait)
        await store.aclose()

    serving = thread.submit(asyncio.run, serve())
    yield settings.result(WAIT_S)
    stop.set()
    serving.result(WAIT_S)
    thread.shutdown()


@pytest.fixture
async def gateway(shared_workers: GatewaySettings, store: SessionStore) -> AsyncGenerator[str, None]:
    """HOST:PORT of a gateway over the shared workers, which are idle when it has stopped."""
    async with run_gateway(store, shared_workers) as target:
        yield target


@pytest.fixture
def target(request: pytest.FixtureRequest) -> str:
    """HOST:PORT of the gateway under test."""
    given: str | None = request.config.getoption("--target")
    own: str = given or request.getfixturevalue("gateway")
    return own


@pytest.fixture
async def stub(target: str) -> AsyncGenerator[Stub, None]:
    async with connected(target) as stub:
        yield stub


@pytest.fixture
async def capabilities(stub: Stub) -> pb.GetCapabilitiesResponse:
    return await stub.GetCapabilities(pb.GetCapabilitiesRequest(), timeout=10)


@pytest.fixture
def portrait() -> bytes:
    """The portrait of the repository's assets."""
    return (ASSETS / "portrait.png").read_bytes()


@pytest.fixture
def quotas() -> str:
    """Lines of acme's table in the file of tenants; a test sets them by parametrization."""
    return ""


@pytest.fixture
async def tenant_gateway(
    request: pytest.FixtureRequest, checkpoint: Path, store: SessionStore, redis: str, tmp_path: Path, quotas: str
) -> AsyncGenerator[TenantGateway, None]:
    if request.config.getoption("--target"):
        pytest.skip("the tokens of the given gateway are unknown")
    async with gateway_with_tenants(checkpoint, tmp_path, quotas, store, redis) as gateway:
        yield gateway


@pytest.fixture
async def acme(tenant_gateway: TenantGateway) -> AsyncGenerator[Stub, None]:
    async with tenant_gateway.connected(ACME) as stub:
        yield stub


@pytest.fixture
async def globex(tenant_gateway: TenantGateway) -> AsyncGenerator[Stub, None]:
    async with tenant_gateway.connected(GLOBEX) as stub:
        yield stub
