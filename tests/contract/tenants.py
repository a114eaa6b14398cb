"""A gateway with two tenants, which serves TLS and whose workers require certificates."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from avatar.rpc.tls import channel_credentials
from avatar.settings import GatewaySettings
from avatar.store.sessions import SessionStore
from services.local.suite import gateway
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
    settings: GatewaySettings, authority: Authority, file: Path, quotas: str, store: SessionStore
) -> AsyncGenerator[TenantGateway, None]:
    """Run a gateway with two tenants, acme with quotas. authority: of its certificate. file: of tenants, is written."""
    acme, globex = (hashlib.sha256(token.encode()).hexdigest() for token in (ACME, GLOBEX))
    file.write_text(f'[acme]\ntokens = ["{acme}"]\n{quotas}\n[globex]\ntokens = ["{globex}"]')
    async with gateway(store, settings.model_copy(update={"tenants": file})) as target:
        yield TenantGateway(target, store, channel_credentials(authority.ca))
