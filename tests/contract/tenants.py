"""A gateway of our own with two tenants, over TLS; its workers ask for certificates."""

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
class Gateway:
    """A gateway with tenants. target: HOST:PORT. store: where its sessions are."""

    target: str
    store: SessionStore
    trust: grpc.ChannelCredentials

    def called(self, token: str | None) -> AbstractAsyncContextManager[Stub]:
        """A stub whose calls carry a token."""
        if token is None:
            return connected(self.target, self.trust)
        bearer = grpc.access_token_call_credentials(token)
        return connected(self.target, grpc.composite_channel_credentials(self.trust, bearer))


@asynccontextmanager
async def tenanted(
    checkpoint: Path, tmp_path: Path, quotas: str, store: SessionStore, redis_url: str
) -> AsyncGenerator[Gateway, None]:
    """A gateway of two tenants, acme with quotas; its files are made in tmp_path."""
    tenants = tmp_path / "tenants.toml"
    acme, globex = (hashlib.sha256(token.encode()).hexdigest() for token in (ACME, GLOBEX))
    tenants.write_text(f'[acme]\ntokens = ["{acme}"]\n{quotas}\n[globex]\ntokens = ["{globex}"]')
    authority = Authority(tmp_path)
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
        yield Gateway(target, store, channel_credentials(authority.ca))
