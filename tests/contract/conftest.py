"""Contract tests run against any gateway: `pytest tests/contract --target HOST:PORT`; else against one of their own."""

from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest

from avatar.settings import GatewaySettings
from avatar.store.sessions import SessionStore
from avatar.v1 import avatar_service_pb2 as pb
from tests.certificates import Authority
from tests.conftest import ASSETS
from tests.contract.tenants import ACME, GLOBEX, TenantGateway, gateway_with_tenants
from tests.product import Stub, connected
from tests.workers import workers_in_thread


@pytest.fixture(scope="session")
def trusted_workers(
    checkpoint: Path, redis_server: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[GatewaySettings, Authority]]:
    """Settings of a gateway with TLS over workers that require certificates, and the authority of all of them."""
    authority = Authority(tmp_path_factory.mktemp("authority"))
    edge, worker, client = (authority.issue(name, "127.0.0.1") for name in ("edge", "worker", "client"))
    settings = GatewaySettings(
        listen="127.0.0.1:0",
        cell="trusted",
        redis_url=redis_server,
        tls_cert=edge.cert,
        tls_key=edge.key,
        worker_ca=authority.ca,
        worker_cert=client.cert,
        worker_key=client.key,
    )
    of_workers: dict[str, Any] = {"tls_cert": worker.cert, "tls_key": worker.key, "tls_client_ca": authority.ca}
    with workers_in_thread(checkpoint, redis_server, settings, **of_workers) as given:
        yield given, authority


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
    request: pytest.FixtureRequest, store: SessionStore, tmp_path: Path, quotas: str
) -> AsyncGenerator[TenantGateway, None]:
    if request.config.getoption("--target"):
        pytest.skip("the tokens of the given gateway are unknown")
    settings, authority = request.getfixturevalue("trusted_workers")
    async with gateway_with_tenants(settings, authority, tmp_path / "tenants.toml", quotas, store) as gateway:
        yield gateway


@pytest.fixture
async def acme(tenant_gateway: TenantGateway) -> AsyncGenerator[Stub, None]:
    async with tenant_gateway.connected(ACME) as stub:
        yield stub


@pytest.fixture
async def globex(tenant_gateway: TenantGateway) -> AsyncGenerator[Stub, None]:
    async with tenant_gateway.connected(GLOBEX) as stub:
        yield stub
