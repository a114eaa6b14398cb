"""Tests of services.local.suite: the program `python -m services`."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from avatar import telemetry
from avatar.settings import GatewaySettings
from avatar.store.sessions import SessionStore
from services.local import suite


def redis_servers() -> set[int]:
    """Return the process ids of the Redis servers that this process started."""
    return {each.pid for each in psutil.Process().children(recursive=True) if each.name().startswith("valkey")}


async def test_all_services_in_one_process_run_their_own_redis(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
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
    assert re.fullmatch(r"ready at 127\.0\.0\.1:\d+\n", capsys.readouterr().out)


async def test_all_models_are_loaded_before_a_worker_is_registered(
    checkpoint: Path, store: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading one holds the event loop; a worker's write that waits for it fails, and is logged."""
    order: list[str] = []

    def recorded(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        order.append(name)
        return function(*arguments)

    for name in ("build_audio", "build_vae", "build_denoiser", "registered"):
        monkeypatch.setattr(suite, name, partial(recorded, name, getattr(suite, name)))
    async with suite.workers(checkpoint, store, GatewaySettings(), denoisers=("0", "1,2")):
        pass
    assert order == ["build_audio", "build_vae", *["build_denoiser"] * 2, *["registered"] * 4]


async def test_all_services_in_one_process_serve_the_sizes_of_the_settings(
    checkpoint: Path, redis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "set_up", lambda *_: None)
    for name, value in {"CHECKPOINT": str(checkpoint), "REDIS_URL": redis, "SIZES": "512x320"}.items():
        monkeypatch.setenv(f"AVATAR_{name}", value)
    with pytest.raises(ValueError, match="AVATAR_SIZES: size must be 64x64, the only one of this checkpoint"):
        await suite.main()
