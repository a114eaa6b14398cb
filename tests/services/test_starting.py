"""What cannot be used of its settings ends a service's start, in one line that names it."""

import asyncio
import os
import sys

import pytest

from services.launch import ROOT


@pytest.mark.parametrize(
    ("service", "name", "value", "expected"),
    [
        ("gateway", "AVATAR_DRAIN_S", "soon", "expected float"),
        ("gateway", "AVATAR_REDIS_URL", "localhost", "expected redis://HOST:PORT, rediss:// or unix://"),
        ("denoiser", "AVATAR_CAPACITY", "0", "expected at least 1"),
    ],
)
async def test_a_setting_that_cannot_be_used_ends_the_start(service: str, name: str, value: str, expected: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", f"services.{service}"),
        cwd=ROOT,
        env={**os.environ, "AVATAR_LISTEN": "127.0.0.1:0", name: value},
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await process.communicate()
    assert process.returncode == 1
    (line,) = said.decode().splitlines()
    assert line.startswith(f"error: {name} is ")
    assert value in line
    assert line.endswith(expected)
