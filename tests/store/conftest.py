"""A Redis server of their own for tests that expect to find their keys alone in it."""

from collections.abc import Iterator

import pytest

from tests.conftest import redis_in


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Redis server, in which the workers that other tests share are not registered."""
    with redis_in(tmp_path_factory.mktemp("redis")) as url:
        yield url
