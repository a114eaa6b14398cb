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
