"""Contract tests run against any gateway: `pytest tests/contract --target HOST:PORT`; else against one of their own."""

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from avatar.store.sessions import SessionStore
from avatar.v1 import avatar_service_pb2 as pb
from tests.conftest import ASSETS
from tests.contract.tenants import ACME, GLOBEX, TenantGateway, gateway_with_tenants
from tests.product import Stub, connected


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
