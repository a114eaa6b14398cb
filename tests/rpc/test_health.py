"""Tests of avatar.rpc.health as a container runs it: as a file, without packages, against a live server."""

import asyncio
import sys
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from avatar.rpc.server import serving
from services.local.processes import free_ports
from tests.rpc.conftest import Worker

FILE = Path(__file__).parents[2] / "avatar/rpc/health.py"


async def check(*arguments: str) -> tuple[int | None, str]:
    """Return the program's exit status and its output."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", str(FILE), *arguments), stderr=asyncio.subprocess.PIPE
    )
    _, output = await process.communicate()
    return process.returncode, output.decode()


async def test_a_server_that_serves_is_healthy() -> None:
    async with serving("127.0.0.1:0", worker := Worker()) as port:
        assert await check(f"127.0.0.1:{port}") == (0, "")
        assert await check(f"127.0.0.1:{port}", worker.service_name) == (0, "")
        status, output = await check(f"127.0.0.1:{port}", "avatar.v1.AvatarService")
    assert status == 1
    assert output == f"127.0.0.1:{port}: does not answer health checks of avatar.v1.AvatarService\n"


async def test_a_draining_server_is_not_healthy() -> None:
    server = grpc.aio.server()
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await checks.set("", health_pb2.HealthCheckResponse.SERVING)
    assert await check(f"127.0.0.1:{port}") == (0, "")
    await checks.enter_graceful_shutdown()
    assert await check(f"127.0.0.1:{port}") == (1, f"127.0.0.1:{port}: NOT_SERVING\n")
    await server.stop(None)


async def test_a_missing_server_is_not_healthy() -> None:
    (port,) = free_ports(1)
    status, output = await check(f"127.0.0.1:{port}")
    assert status == 1
    assert output.startswith(f"127.0.0.1:{port}: [Errno 111] Connection refused")
    assert output.count("\n") == 1


async def test_usage_is_printed_without_an_address() -> None:
    status, output = await check()
    assert status == 1
    assert "python -m avatar.rpc.health HOST:PORT" in output
