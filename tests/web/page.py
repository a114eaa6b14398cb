"""The page's server over the stand-in gateway, or over a running one."""

import shlex
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avatar.client import Avatar, connect
from avatar.store.sessions import SessionStore
from tests.standin import StandInGateway, standin_gateway
from web.page_server import PageServer, portraits
from web.playout import RATE_HZ
from web.text_to_speech import Synthesiser

ASSETS = Path(__file__).parents[2] / "assets"
MAX_PEERS = 2
# A synthesiser that writes a second of a tone for any text, and fails for "fail".
TONE = """
import math, struct, sys, wave
with wave.open(sys.argv[2], "wb") as file:
    file.setnchannels(1), file.setsampwidth(2), file.setframerate(16000)
    file.writeframes(b"".join(struct.pack("<h", int(9000 * math.sin(i / 8))) for i in range(16000)))
sys.exit(sys.argv[1] == "fail")
"""


def speech_command() -> str:
    return f"{shlex.quote(sys.executable)} -c {shlex.quote(TONE)} {{text}} {{wav}}"


@dataclass
class Page:
    """A served page, its client, and the stand-in gateway, which is idle if the page uses a running one."""

    url: str
    server: PageServer
    avatar: Avatar
    gateway: StandInGateway


@asynccontextmanager
async def serving(store: SessionStore, target: str | None = None, **settings: Any) -> AsyncGenerator[Page, None]:
    """Serve a page. target: HOST:PORT of a running gateway. settings: of the stand-in gateway."""
    async with (
        standin_gateway(store, max_picture_bytes=2 << 20, drain_s=0.0, **settings) as gateway,
        connect(target or gateway.target) as avatar,
    ):
        synthesiser = Synthesiser(speech_command(), RATE_HZ)
        server = PageServer(avatar, await avatar.capabilities(), portraits(ASSETS), synthesiser, MAX_PEERS)
        async with server.serving("127.0.0.1", 0) as url:
            yield Page(url, server, avatar, gateway)
