"""A Redis server of their own for tests that expect to find their keys alone in it."""

import asyncio
from collections.abc import Iterator

import pytest

from services.local.processes import local_redis


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Redis server, in which the workers that other tests share are not registered."""
    with asyncio.Runner() as runner:
        server = local_redis(tmp_path_factory.mktemp("redis"))
        yield runner.run(server.__aenter__())
        runner.run(server.__aexit__(None, None, None))
