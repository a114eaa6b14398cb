"""The page's server over the stand-in gateway, or over a running one."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avatar.client import Avatar, connect
from avatar.store.sessions import SessionStore
from tests.services.voice.fakes import ToneEngine, voice_worker
from tests.standin import StandInGateway, standin_gateway
from web.page_server import PageServer, portraits

ASSETS = Path(__file__).parents[2] / "assets"
MAX_PEERS = 2


@dataclass
class Page:
    """A served page, its client, and the stand-in gateway with its voice, idle if the page uses a running gateway."""

    url: str
    server: PageServer
    avatar: Avatar
    gateway: StandInGateway
    engine: ToneEngine


@asynccontextmanager
async def serving(store: SessionStore, target: str | None = None, **settings: Any) -> AsyncGenerator[Page, None]:
    """Serve a page. target: HOST:PORT of a running gateway. settings: of the stand-in gateway."""
    engine = ToneEngine()
    async with (
        voice_worker(store, engine) as voice,
        standin_gateway(store, max_picture_bytes=2 << 20, drain_s=0.0, voice=(voice,), **settings) as gateway,
        connect(target or gateway.target) as avatar,
    ):
        server = PageServer(avatar, await avatar.capabilities(), portraits(ASSETS), MAX_PEERS)
        async with server.serving("127.0.0.1", 0) as url:
            yield Page(url, server, avatar, gateway, engine)
