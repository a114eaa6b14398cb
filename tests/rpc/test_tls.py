"""Tests of avatar.rpc.tls: which peers connect, renewed certificates, and errors about unusable files."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from avatar.rpc.channel import channel
from avatar.rpc.health import problem
from avatar.rpc.server import serving
from avatar.rpc.tls import channel_credentials, server_credentials, worker_credentials
from avatar.settings import GatewaySettings, load
from tests.certificates import Authority, Pair
from tests.rpc.conftest import Worker

ANY = "127.0.0.1:0"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def worker(authority: Authority) -> Pair:
    """The certificate of a worker, for its name."""
    return authority.issue("worker", "worker.test")


@pytest.fixture
def gateway(authority: Authority) -> Pair:
    """The certificate of the gateway as the workers' client."""
    return authority.issue("gateway", "gateway.test")


async def connects(target: str, credentials: grpc.ChannelCredentials | None, name: str = "") -> bool:
    """Return whether the server at HOST:PORT accepts a client with these credentials."""
    async with channel(target, credentials, name=name) as connection:
        stub: Any = health_pb2_grpc.HealthStub(connection)
        try:
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
        except grpc.aio.AioRpcError as error:
            return error.code() is not grpc.StatusCode.UNAVAILABLE
        return True


async def test_a_client_that_trusts_the_certificate_connects(authority: Authority, worker: Pair) -> None:
    async with serving(ANY, Worker(), credentials=server_credentials(*worker)) as port:
        target = f"127.0.0.1:{port}"
        assert await connects(target, channel_credentials(authority.ca), "worker.test")
        assert not await connects(target, channel_credentials(authority.ca), "another.test")
        assert not await connects(target, channel_credentials(authority.ca)), "its address is not in its certificate"
        assert not await connects(target, channel_credentials(), "worker.test"), "no public authority has signed it"
        assert not await connects(target, None)


async def test_mutual_tls_refuses_clients_without_a_certificate(
    tmp_path: Path, authority: Authority, worker: Pair, gateway: Pair
) -> None:
    stranger = Authority(tmp_path, "stranger").issue("forged", "gateway.test")
    async with serving(ANY, Worker(), credentials=server_credentials(*worker, authority.ca)) as port:
        target = f"127.0.0.1:{port}"
        assert await connects(target, worker_credentials(authority.ca, *gateway), "worker.test")
        assert not await connects(target, worker_credentials(authority.ca, None, None), "worker.test")
        assert not await connects(target, channel_credentials(authority.ca, *stranger), "worker.test")


def test_without_files_everything_is_plain_text() -> None:
    assert server_credentials(None, None) is None
    assert worker_credentials(None, None, None) is None


async def test_a_replaced_certificate_is_used_for_the_next_connection(authority: Authority, worker: Pair) -> None:
    trusting = channel_credentials(authority.ca)
    async with serving(ANY, Worker(), credentials=server_credentials(*worker)) as port:
        target = f"127.0.0.1:{port}"
        assert await connects(target, trusting, "worker.test")
        key = worker.key.read_bytes()
        worker.key.write_text("half of it")
        assert await connects(target, trusting, "worker.test"), "files that do not match are not used"
        worker.key.write_bytes(key)
        authority.issue("worker", "renewed.test")
        assert await connects(target, trusting, "renewed.test")


@pytest.mark.parametrize("is_mutual", [False, True])
@pytest.mark.parametrize("host", ["worker.test", "*.worker.test", "127.0.0.1"])
async def test_the_health_check_accepts_only_its_own_servers_certificate(
    authority: Authority, host: str, is_mutual: bool
) -> None:
    pair = authority.issue("worker", host)
    client_ca = authority.ca if is_mutual else None
    async with serving(ANY, Worker(), credentials=server_credentials(*pair, client_ca)) as port:
        target = f"127.0.0.1:{port}"
        assert await asyncio.to_thread(problem, target, cert=pair.cert, key=pair.key) == ""
        assert "does not answer" in await asyncio.to_thread(problem, target)
        another = authority.issue("another", host)
        assert target in await asyncio.to_thread(problem, target, cert=another.cert, key=another.key)


async def test_the_health_check_reads_the_servers_variables(worker: Pair) -> None:
    variables = {"AVATAR_TLS_CERT": str(worker.cert), "AVATAR_TLS_KEY": str(worker.key)}
    async with serving(ANY, Worker(), credentials=server_credentials(*worker)) as port:
        program = (sys.executable, "-m", "avatar.rpc.health", f"127.0.0.1:{port}")
        process = await asyncio.create_subprocess_exec(*program, env={**os.environ, **variables})
        assert await process.wait() == 0


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("cert", None, "AVATAR_TLS_CERT is .*, expected a file that can be read: No such file"),
        ("cert", "no certificate", "AVATAR_TLS_CERT is .*, expected a PEM file of certificates"),
        ("key", None, "AVATAR_TLS_KEY is .*, expected a file that can be read"),
        ("key", "no key", "AVATAR_TLS_KEY is .*, expected the private key of AVATAR_TLS_CERT"),
        ("client_ca", "", "AVATAR_TLS_CLIENT_CA is .*, expected a PEM file of certificates"),
    ],
)
def test_an_unusable_file_is_named_by_its_variable(
    tmp_path: Path, authority: Authority, worker: Pair, name: str, content: str | None, words: str
) -> None:
    broken = tmp_path / "broken.pem"
    if content is not None:
        broken.write_text(content)
    files: dict[str, Any] = {"cert": worker.cert, "key": worker.key, "client_ca": authority.ca}
    files[name] = broken
    with pytest.raises(ValueError, match=words):
        server_credentials(**files)


def test_a_key_of_another_certificate_is_refused(worker: Pair, gateway: Pair, authority: Authority) -> None:
    with pytest.raises(ValueError, match=r"AVATAR_TLS_KEY is .*gateway\.key', expected the private key of AVATAR_TLS"):
        server_credentials(worker.cert, gateway.key)
    with pytest.raises(ValueError, match=r"AVATAR_WORKER_KEY is .*, expected the private key of AVATAR_WORKER_CERT"):
        worker_credentials(authority.ca, worker.cert, gateway.key)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["TLS_CERT"], "AVATAR_TLS_CERT is set and AVATAR_TLS_KEY is not"),
        (["TLS_KEY"], "AVATAR_TLS_KEY is set and AVATAR_TLS_CERT is not"),
        (["TLS_CLIENT_CA"], "AVATAR_TLS_CLIENT_CA is set and AVATAR_TLS_CERT is not"),
        (["WORKER_CERT", "WORKER_CA"], "AVATAR_WORKER_CERT is set and AVATAR_WORKER_KEY is not"),
        (["WORKER_KEY", "WORKER_CERT"], "AVATAR_WORKER_CERT is set and AVATAR_WORKER_CA is not"),
    ],
)
def test_a_setting_without_its_other_half_is_refused(names: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load(GatewaySettings, {f"AVATAR_{name}": "file.pem" for name in names})


def test_a_variable_that_is_empty_names_no_file() -> None:
    assert load(GatewaySettings, {"AVATAR_TLS_CERT": "", "AVATAR_TENANTS": ""}) == GatewaySettings()


def test_a_service_does_not_start_with_an_unusable_certificate(worker: Pair) -> None:
    variables = {"AVATAR_TLS_CERT": str(worker.cert), "AVATAR_TLS_KEY": str(worker.cert)}
    program = [sys.executable, "-m", "services.gateway"]
    done = subprocess.run(program, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: AVATAR_TLS_KEY is ")
