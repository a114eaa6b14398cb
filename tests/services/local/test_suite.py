"""Tests of services.local.suite: the program `python -m services`."""

from pathlib import Path

import psutil
import pytest

from avatar import telemetry
from services.local import suite


def redis_servers() -> set[int]:
    """Return the process ids of the Redis servers that this process started."""
    return {each.pid for each in psutil.Process().children(recursive=True) if each.name().startswith("valkey")}


async def test_all_services_in_one_process_run_their_own_redis(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, during = redis_servers(), set()

    async def until_stopped() -> None:
        during.update(redis_servers())

    monkeypatch.setattr(telemetry, "set_up", lambda *_: None)  # it configures the whole process
    monkeypatch.setattr(suite, "until_stopped", until_stopped)
    monkeypatch.setenv("AVATAR_CHECKPOINT", str(checkpoint))
    monkeypatch.setenv("AVATAR_LISTEN", "127.0.0.1:0")
    await suite.main()
    assert len(during - before) == 1
    assert redis_servers() == before


async def test_all_services_in_one_process_serve_the_sizes_of_the_settings(
    checkpoint: Path, redis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "set_up", lambda *_: None)
    for name, value in {"CHECKPOINT": str(checkpoint), "REDIS_URL": redis, "SIZES": "512x320"}.items():
        monkeypatch.setenv(f"AVATAR_{name}", value)
    with pytest.raises(ValueError, match="AVATAR_SIZES: size must be 64x64, the only one of this checkpoint"):
        await suite.main()
