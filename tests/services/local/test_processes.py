"""Tests of services.local.processes: the life of a suite's processes."""

import asyncio
import signal
import socket
import sys
from pathlib import Path

import psutil
import pytest

from services.local.processes import ROOT, Suite, until_healthy

WAIT_S = 60.0

# A shell starts background programs with SIGINT ignored, and they pass that on to theirs.
LAUNCHER = """
import asyncio, signal, sys
from pathlib import Path
from services.local.processes import Suite, free_ports, start_redis

async def main():
    redis, gateway = free_ports(2)
    suite = Suite(Path(sys.argv[1]), f"redis://127.0.0.1:{redis}", {"gateway": f"127.0.0.1:{gateway}"})
    async with suite:
        await start_redis(suite, redis)
        settings = {"AVATAR_LISTEN": suite.gateway, "AVATAR_REDIS_URL": suite.redis_url}
        await suite.start("gateway", sys.executable, "-m", "services.gateway", **settings)
        await asyncio.sleep(60)

signal.signal(signal.SIGINT, signal.default_int_handler)
asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "ctrl-C"])
async def test_no_process_and_no_port_is_left_when_the_launcher_ends(number: signal.Signals, tmp_path: Path) -> None:
    launcher = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", LAUNCHER, str(tmp_path)), cwd=ROOT, stderr=asyncio.subprocess.DEVNULL
    )
    ports: set[int] = set()
    async with asyncio.timeout(WAIT_S):
        while len(ports) < 2:  # Redis and the gateway
            await asyncio.sleep(0.1)
            children = psutil.Process(launcher.pid).children(recursive=True)
            ports = {at.laddr.port for child in children for at in child.net_connections() if at.status == "LISTEN"}
        launcher.send_signal(number)
        await launcher.wait()
    _, alive = await asyncio.to_thread(psutil.wait_procs, children, WAIT_S)
    assert not alive
    for port in ports:
        with socket.socket() as client:
            assert client.connect_ex(("127.0.0.1", port)) != 0, f"port {port} is still open"


async def test_a_process_that_cannot_start_ends_the_launch_with_its_output(tmp_path: Path) -> None:
    async with Suite(tmp_path, "redis://127.0.0.1:1", {"gateway": "127.0.0.1:1"}) as suite:
        await suite.start("gateway", sys.executable, "-m", "services.gateway", AVATAR_DRAIN_S="soon")
        with pytest.raises(RuntimeError, match=r"(?s)gateway ended while starting.*AVATAR_DRAIN_S is 'soon'"):
            await until_healthy(suite)
