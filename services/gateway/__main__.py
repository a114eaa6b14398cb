"""The gateway's process: `python -m services.gateway`."""

import logging
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from avatar import telemetry
from avatar.rpc.server import serving, until_stopped
from avatar.rpc.tls import server_credentials
from avatar.settings import GatewaySettings, load
from avatar.store.redis import RedisHashes
from avatar.store.sessions import SessionStore
from services.address import advertised_address
from services.gateway.access.quotas import open_quotas
from services.gateway.access.tenants import Authentication, Tokens
from services.gateway.cell import Cell
from services.gateway.live_sessions import LiveSessions
from services.gateway.service import AvatarServicer
from services.gateway.workers import Workers
from services.process import run

logger = logging.getLogger(__name__)


@asynccontextmanager
async def gateway(settings: GatewaySettings, store: SessionStore) -> AsyncGenerator[int, None]:
    """Run a gateway while the body runs; yields its port. ValueError names a setting whose file cannot be used."""
    credentials = server_credentials(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    authentication = [Authentication(Tokens(settings.tenants))] if settings.tenants else []
    if not settings.marks:
        logger.warning("frames carry no machine-readable marks: AVATAR_MARKS is false")
    registry = store.workers(settings.cell)
    cell = Cell(settings, registry)
    await cell.read()
    async with (
        open_quotas(store.usage) as quotas,
        Workers(settings, registry).running() as workers,
        LiveSessions(settings, store, workers, quotas, cell) as live_sessions,
        serving(
            settings.listen,
            AvatarServicer(settings, store, workers, live_sessions, quotas, cell),
            drain_s=settings.drain_s,
            credentials=credentials,
            interceptors=authentication,
            max_message_bytes=settings.max_message_bytes,
            checks=cell.checks,
        ) as port,
        cell.serving(await advertised_address(settings, port)),
    ):
        yield port
        live_sessions.announce_stop()


async def main() -> None:
    settings = load(GatewaySettings, os.environ)
    telemetry.set_up("avatar-gateway", settings.log_level)
    store = SessionStore(RedisHashes(settings.redis_url))
    async with gateway(settings, store):
        await until_stopped()
    await store.aclose()


if __name__ == "__main__":
    run(main)
