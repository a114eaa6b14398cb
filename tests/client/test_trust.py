"""The client against a gateway with TLS and tenants, and the protection of its token."""

import hashlib
from pathlib import Path

import pytest

from avatar.client import AvatarError, channel_credentials, connect
from avatar.settings import GatewaySettings
from avatar.store.sessions import SessionStore
from services.local.suite import suite
from tests.certificates import Authority
from tests.conftest import speech

TOKEN = "a token"


async def test_a_client_with_certificate_and_token_is_served(
    checkpoint: Path, redis: str, store: SessionStore, picture: bytes, tmp_path: Path
) -> None:
    tenants = tmp_path / "tenants.toml"
    tenants.write_text(f'[acme]\ntokens = ["{hashlib.sha256(TOKEN.encode()).hexdigest()}"]\nmax_sessions = 1')
    authority = Authority(tmp_path)
    edge, client = authority.issue("edge", "127.0.0.1"), authority.issue("client")
    settings = GatewaySettings(
        listen="127.0.0.1:0",
        redis_url=redis,
        tenants=tenants,
        tls_cert=edge.cert,
        tls_key=edge.key,
        tls_client_ca=authority.ca,
    )
    credentials = channel_credentials(authority.ca, *client)
    async with suite(checkpoint, store, settings) as target:
        async with connect(target, credentials=credentials, token=TOKEN) as avatar:
            session = await avatar.create(picture, seed=7)
            async with session.stream(audio=speech(0.5)) as stream:
                assert len([frame async for frame in stream.frames()]) == 21
            session = await avatar.create(picture)
            with pytest.raises(AvatarError) as caught:
                await avatar.create(picture)
            assert (caught.value.reason, caught.value.metadata) == ("QUOTA_EXCEEDED", {"quota": "sessions"})
            await session.delete()
        async with connect(target, credentials=credentials, token="another") as avatar:
            with pytest.raises(AvatarError) as caught:
                await avatar.capabilities()
            assert caught.value.reason == "UNAUTHENTICATED"
        async with connect(target, credentials=channel_credentials(authority.ca), token=TOKEN) as avatar:
            with pytest.raises(AvatarError) as caught:
                await avatar.capabilities()
            assert caught.value.reason == "CONNECTION_LOST", "no client certificate"


@pytest.mark.parametrize(
    "target", ["avatar.example.com:7000", "10.0.0.1:7000", "dns:///gateway:7000", "[fe80::1]:7000"]
)
async def test_a_token_never_leaves_the_machine_in_plain_text(target: str) -> None:
    with pytest.raises(ValueError, match=r"the token would be sent to .* in plain text"):
        async with connect(target, token=TOKEN):
            pass
    async with connect(target, token=TOKEN, plaintext_token=True), connect(target):
        pass
    async with connect(target, token=TOKEN, credentials=channel_credentials()):
        pass


@pytest.mark.parametrize(
    "target", ["localhost:7000", "127.0.0.1:7000", "[::1]:7000", "dns:///localhost:7000", "unix:x"]
)
async def test_a_token_may_be_sent_to_this_machine(target: str) -> None:
    async with connect(target, token=TOKEN):
        pass
