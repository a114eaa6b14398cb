"""Contract tests run against any gateway: `pytest tests/contract --target HOST:PORT`; else against one of their own."""

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from avatar.store.sessions import SessionStore
from tests.conftest import ASSETS
from tests.contract.tenants import ACME, GLOBEX, Gateway, tenanted
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
def portrait() -> bytes:
    """The portrait that ships."""
    return (ASSETS / "portrait.png").read_bytes()


@pytest.fixture
def quotas() -> str:
    """Lines of acme's table."""
    return ""


@pytest.fixture
async def gateway_of_tenants(
    request: pytest.FixtureRequest, checkpoint: Path, store: SessionStore, redis: str, tmp_path: Path, quotas: str
) -> AsyncGenerator[Gateway, None]:
    if request.config.getoption("--target"):
        pytest.skip("of a gateway whose tokens are not known")
    async with tenanted(checkpoint, tmp_path, quotas, store, redis) as gateway:
        yield gateway


@pytest.fixture
async def acme(gateway_of_tenants: Gateway) -> AsyncGenerator[Stub, None]:
    async with gateway_of_tenants.called(ACME) as stub:
        yield stub


@pytest.fixture
async def globex(gateway_of_tenants: Gateway) -> AsyncGenerator[Stub, None]:
    async with gateway_of_tenants.called(GLOBEX) as stub:
        yield stub
