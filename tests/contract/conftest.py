"""Contract tests run against any gateway: `pytest tests/contract --target HOST:PORT`; else against one of their own."""

from collections.abc import AsyncGenerator

import pytest

from avatar.v1 import avatar_service_pb2_grpc as pb_grpc
from tests.conftest import ASSETS
from tests.product import connected


@pytest.fixture
def target(request: pytest.FixtureRequest) -> str:
    """HOST:PORT of the gateway under test."""
    given: str | None = request.config.getoption("--target")
    own: str = given or request.getfixturevalue("gateway")
    return own


@pytest.fixture
async def stub(target: str) -> "AsyncGenerator[pb_grpc.AvatarServiceAsyncStub, None]":
    async with connected(target) as stub:
        yield stub


@pytest.fixture
def portrait() -> bytes:
    """The portrait that ships."""
    return (ASSETS / "portrait.png").read_bytes()
