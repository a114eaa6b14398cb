"""The voice worker's process: `python -m services.voice`."""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from avatar import telemetry
from avatar.rpc.server import serving, until_stopped
from avatar.rpc.tls import server_credentials
from avatar.settings import VoiceSettings, load
from avatar.store.redis import RedisHashes
from avatar.store.sessions import SessionStore
from services.address import advertised_address
from services.process import run
from services.registration import registered
from services.voice.endpoint import Endpoint
from services.voice.engines import Command, Engine
from services.voice.service import VoiceServicer


@asynccontextmanager
async def open_voice(settings: VoiceSettings) -> AsyncGenerator[VoiceServicer, None]:
    """Yield the service over the settings' engine while the body runs. ValueError if there is no such engine."""
    languages, timeout_s = settings.voice_languages, settings.voice_timeout_s
    if bool(settings.voice_url) == bool(settings.voice_command):
        raise ValueError("set one of AVATAR_VOICE_URL and AVATAR_VOICE_COMMAND")
    if settings.voice_command:
        engine: Engine = Command(settings.voice_command, languages, timeout_s)
        yield VoiceServicer(engine, settings.capacity)
        return
    speaker = settings.voice_model, settings.voice_name
    async with Endpoint(settings.voice_url, settings.voice_key, *speaker, languages, timeout_s) as engine:
        yield VoiceServicer(engine, settings.capacity)


async def main() -> None:
    settings = load(VoiceSettings, os.environ)
    telemetry.set_up("avatar-voice", settings.log_level)
    credentials = server_credentials(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    store = SessionStore(RedisHashes(settings.redis_url))
    try:
        async with (
            open_voice(settings) as servicer,
            serving(settings.listen, servicer, drain_s=settings.drain_s, credentials=credentials) as port,
            registered(store.workers(settings.cell), await advertised_address(settings, port), servicer),
        ):
            await until_stopped()
    finally:
        await store.aclose()


if __name__ == "__main__":
    run(main)
