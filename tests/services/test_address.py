"""Tests of services.address: the address at which the other services reach a process."""

import asyncio
from typing import Any

import pytest

from avatar.settings import AudioSettings
from services.address import advertised_address


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"listen": "127.0.0.1:0"}, "127.0.0.1:5"),
        ({"listen": "127.0.0.2:7001", "redis_url": "redis://192.0.2.7:6379"}, "127.0.0.2:5"),
        ({"listen": "[::1]:7001"}, "[::1]:5"),
        ({"listen": "0.0.0.0:7001", "redis_url": "redis://:secret@127.0.0.1:6379/0"}, "127.0.0.1:5"),
        ({"listen": "[::]:7001", "redis_url": "rediss://127.0.0.1"}, "127.0.0.1:5"),
        ({"listen": "0.0.0.0:7001", "redis_url": "unix:///run/redis.sock"}, "127.0.0.1:5"),
        ({"listen": "0.0.0.0:7001", "advertise": "worker-3.example.com:443"}, "worker-3.example.com:443"),
    ],
)
async def test_an_address_is_that_of_listen_or_on_the_way_to_redis(settings: dict[str, Any], expected: str) -> None:
    assert await advertised_address(AudioSettings(**settings), 5) == expected


async def test_a_name_that_cannot_be_resolved_leaves_the_default_route(monkeypatch: pytest.MonkeyPatch) -> None:
    async def unresolved(_: Any, host: str, *__: Any, **___: Any) -> list[Any]:
        if host == "0.0.0.0":
            return [(None, None, None, "", (host, 0))]
        raise OSError(f"{host} is unknown")

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", unresolved)
    address = await advertised_address(AudioSettings(listen="0.0.0.0:7001", redis_url="redis://redis:6379"), 5)
    host, _, port = address.rpartition(":")
    assert host not in ("", "0.0.0.0")
    assert port == "5"
