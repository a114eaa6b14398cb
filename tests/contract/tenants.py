"""A gateway with two tenants, which serves TLS and whose workers require certificates."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from avatar.rpc.tls import channel_credentials
from avatar.settings import GatewaySettings
from avatar.store.sessions import SessionStore
from services.local.suite import suite
from tests.certificates import Authority
from tests.product import Stub, connected

ACME, GLOBEX = "acme's token", "globex's token"


@dataclass
class TenantGateway:
    """A running gateway with tenants. target: HOST:PORT. store: of its sessions. trust: for a channel to it."""

    target: str
    store: SessionStore
    trust: grpc.ChannelCredentials

    def connected(self, token: str | None) -> AbstractAsyncContextManager[Stub]:
        """Connect a stub whose calls carry the token."""
        if token is None:
            return connected(self.target, self.trust)
        bearer = grpc.access_token_call_credentials(token)
        return connected(self.target, grpc.composite_channel_credentials(self.trust, bearer))


@asynccontextmanager
async def gateway_with_tenants(
    checkpoint: Path, folder: Path, quotas: str, store: SessionStore, redis_url: str
) -> AsyncGenerator[TenantGateway, None]:
    """Run a gateway with two tenants, acme with quotas. folder: of the files that it needs."""
    tenants = folder / "tenants.toml"
    acme, globex = (hashlib.sha256(token.encode()).hexdigest() for token in (ACME, GLOBEX))
    tenants.write_text(f'[acme]\ntokens = ["{acme}"]\n{quotas}\n[globex]\ntokens = ["{globex}"]')
    authority = Authority(folder)
    edge, worker, client = (authority.issue(name, "127.0.0.1") for name in ("edge", "worker", "client"))
    settings = GatewaySettings(
        listen="127.0.0.1:0",
        redis_url=redis_url,
        tenants=tenants,
        tls_cert=edge.cert,
        tls_key=edge.key,
        worker_ca=authority.ca,
        worker_cert=client.cert,
        worker_key=client.key,
    )
    of_workers: dict[str, Any] = {"tls_cert": worker.cert, "tls_key": worker.key, "tls_client_ca": authority.ca}
    async with suite(checkpoint, store, settings, **of_workers) as target:
        yield TenantGateway(target, store, channel_credentials(authority.ca))
