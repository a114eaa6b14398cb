"""The gateway's process: `python -m services.gateway`."""

import os

from avatar import telemetry
from avatar.rpc.server import serving, until_stopped
from avatar.session import RedisHashes, SessionStore
from avatar.settings import GatewaySettings, load
from services.gateway.conversations import Conversations
from services.gateway.service import AvatarServicer
from services.gateway.workers import Workers
from services.process import run


async def main() -> None:
    settings = load(GatewaySettings, os.environ)
    telemetry.set_up("avatar-gateway", settings.log_level)
    store = SessionStore(RedisHashes(settings.redis_url))
    async with Workers(settings) as workers, Conversations(settings, store, workers) as conversations:
        servicer = AvatarServicer(settings, store, workers, conversations)
        async with serving(settings.listen, servicer, drain_s=settings.drain_s):
            await until_stopped()
            conversations.go_away()
    await store.aclose()


if __name__ == "__main__":
    run(main)
