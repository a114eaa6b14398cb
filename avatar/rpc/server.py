"""A service's server, from start to shutdown."""

import asyncio
import logging
import signal
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from avatar.rpc.channel import MAX_MESSAGE_BYTES, OPTIONS
from avatar.rpc.interceptor import StatusInterceptor

logger = logging.getLogger(__name__)

SERVER_OPTIONS = [
    *OPTIONS,
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    # Two servers on one port would share its connections at random; a worker's streams have state.
    ("grpc.so_reuseport", 0),
]


class Servicer(Protocol):
    """A service that `serving` can add to its server."""

    service_name: str

    def add_to(self, server: grpc.aio.Server) -> None: ...


@asynccontextmanager
async def serving(
    listen: str,
    *servicers: Servicer,
    drain_s: float = 0.0,
    credentials: grpc.ServerCredentials | None = None,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    checks: health.aio.HealthServicer | None = None,
) -> AsyncGenerator[int, None]:
    """Serve while the body runs, with health checks and reflection; yield the port.

    listen: HOST:PORT, port 0 for a free one. drain_s: seconds that open streams get to end in at shutdown.
    credentials: for TLS; plain text without them. interceptors: their exceptions become statuses too.
    max_message_bytes: largest message that is received. checks: health checks, for a caller that changes them while it
    serves. ValueError if the address is in use.
    """
    options = list({**dict(SERVER_OPTIONS), "grpc.max_receive_message_length": max_message_bytes}.items())
    server = grpc.aio.server(interceptors=[StatusInterceptor(), *interceptors], options=options)
    checks = checks or health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    names = [servicer.service_name for servicer in servicers]
    for servicer in servicers:
        servicer.add_to(server)
    reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    try:
        port = server.add_secure_port(listen, credentials) if credentials else server.add_insecure_port(listen)
    except RuntimeError as error:
        raise ValueError(f"cannot listen at {listen}: {error}") from error
    await server.start()
    for name in ["", *names]:
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    logger.info("serving", extra={"services": names, "port": port})
    try:
        yield port
    finally:
        await checks.enter_graceful_shutdown()
        await server.stop(drain_s)


async def until_stopped() -> None:
    """Wait for SIGTERM or SIGINT."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    await stopped.wait()
