"""The page's server over a stand-in of the gateway, or over a running one."""

import shlex
import sys
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from avatar.client import connect
from tests.web.gateway import StandIn, standing_in
from web.playout import RATE_HZ
from web.server import Front, portraits
from web.text_to_speech import Synthesiser

ASSETS = Path(__file__).parents[2] / "assets"
MAX_PEERS = 2
# Speaks like a synthesiser: a second of a tone for whatever it is told.
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
    """A page that is served, and the stand-in behind it, which hears nothing if there is a real gateway."""

    url: str
    front: Front
    gateway: StandIn


@asynccontextmanager
async def serving(target: str | None = None, live_ahead_s: float = 10.0) -> AsyncGenerator[Page, None]:
    """A page over a gateway: HOST:PORT, or a stand-in that takes so much sound ahead."""
    async with AsyncExitStack() as stack:
        standing, gateway = await stack.enter_async_context(standing_in(live_ahead_s))
        avatar = await stack.enter_async_context(connect(target or standing))
        synthesiser = Synthesiser(speech_command(), RATE_HZ)
        front = Front(avatar, await avatar.capabilities(), portraits(ASSETS), synthesiser, MAX_PEERS)
        yield Page(await stack.enter_async_context(front.serving("127.0.0.1", 0)), front, gateway)
