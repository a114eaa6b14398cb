"""Text to the first sound of the voice worker, and to the first frame that a client of a live stream gets.

Over stand-in stages of 20 ms, each a process, with three engines: an endpoint that answers at once, which leaves the
suite's own part; and flite and Piper, if they are installed. Values are wall time; the bound of the first frame is what
GetCapabilities promises for audio that is sent at once, `reaction_ahead_s`.
"""

import asyncio
import shutil
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import grpc.aio
from aiohttp import web

from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import avatar_service_pb2_grpc as pb_grpc
from avatar.worker.v1 import voice_pb2, voice_pb2_grpc
from benchmarks.live import RATE_HZ, LiveClient
from benchmarks.pipeline.metrics import percentile
from benchmarks.pipeline.reaction import LOOKAHEAD_S, STEP_S
from benchmarks.pipeline.suite import standin_suite
from benchmarks.row import Row, row
from benchmarks.standin.content import SHORT
from services.local.local_voice import start_piper, voice_settings
from services.local.processes import Suite, free_ports

TEXT = "Good morning. I am glad that you are here, since there is a lot to tell."
FIRST_SENTENCE = TEXT.partition(".")[0] + ". "
# Between two texts an engine finishes a sentence that nobody needs any more.
TRIALS, IDLE_S, LIMIT_S = 20, 1.5, 180.0
# Longest share of the suite in the first sound, where the engine answers at once.
TARGET_S = 0.05
ENDPOINT = "an endpoint that answers at once"


def rows() -> list[Row]:
    """Measure each engine that is installed."""
    return asyncio.run(_measured())


async def _measured() -> list[Row]:
    found: list[Row] = []
    async with instant_endpoint() as url:
        engines = {ENDPOINT: {"AVATAR_VOICE_URL": url}}
        if shutil.which("flite"):
            engines["flite"] = voice_settings("flite -t {text} -o {wav}")
        if piper := voice_settings():
            engines["Piper"] = piper
        for engine, settings in engines.items():
            found += await _rows(engine, settings)
    return found


async def _rows(engine: str, settings: dict[str, str]) -> list[Row]:
    target = f"127.0.0.1:{free_ports(1)[0]}"
    environment = {"AVATAR_VOICE": target}
    async with (
        standin_suite(STEP_S, content=SHORT, lookahead_s=LOOKAHEAD_S, environment=environment) as suite,
        grpc.aio.insecure_channel(suite.gateway) as channel,
        grpc.aio.insecure_channel(target) as worker,
    ):
        await _start_voice(suite, target, settings)
        async with asyncio.timeout(LIMIT_S):
            await worker.channel_ready()
            return await _trials(engine, pb_grpc.AvatarServiceStub(channel), voice_pb2_grpc.VoiceServiceStub(worker))


async def _start_voice(suite: Suite, target: str, settings: dict[str, str]) -> None:
    if settings.get("AVATAR_VOICE_LANGUAGES") == "en":
        await start_piper(suite, settings)
    listen = {"AVATAR_LISTEN": target, "AVATAR_REDIS_URL": suite.redis_url, "AVATAR_LOG_LEVEL": "WARNING"}
    await suite.start("voice", sys.executable, "-m", "services.voice", **listen, **settings)


async def _trials(
    engine: str, stub: "pb_grpc.AvatarServiceAsyncStub", voice: "voice_pb2_grpc.VoiceServiceAsyncStub"
) -> list[Row]:
    promised = await stub.GetCapabilities(pb.GetCapabilitiesRequest())
    client = await LiveClient.open(stub)
    await client.say(TEXT)  # what is loaded once
    await client.interrupt()
    frames = list[float]()
    for _ in range(TRIALS):
        await client.idle(IDLE_S)
        frames.append(await client.say(TEXT))
        await client.interrupt()
    await client.idle(IDLE_S)
    client.call.cancel()
    sounds = [await _first_sound_s(voice) for _ in range(TRIALS)]
    return voice_rows(engine, promised.reaction_ahead_s, sounds, frames)


async def _first_sound_s(voice: "voice_pb2_grpc.VoiceServiceAsyncStub") -> float:
    """Return the seconds from a text to the first piece of its speech, at the worker."""
    call = voice.Speak()
    opened = voice_pb2.OpenSpeak(encoding="pcm16", rate_hz=RATE_HZ, num_channels=1)
    await call.write(voice_pb2.SpeakRequest(open=opened))
    await call.read()
    started = time.monotonic()
    await call.write(voice_pb2.SpeakRequest(text=voice_pb2.TextPiece(text=FIRST_SENTENCE)))
    await call.read()
    elapsed_s = time.monotonic() - started
    await call.write(voice_pb2.SpeakRequest(close=voice_pb2.CloseSpeak()))
    while await call.read():
        pass
    return elapsed_s


def voice_rows(engine: str, bound_s: float, sounds: list[float], frames: list[float]) -> list[Row]:
    """Return the percentiles of both times. bound_s: promised for audio that is sent at once; 0 if nothing is."""
    found = []
    for percent in (50, 95):
        value, target = percentile(sounds, percent), TARGET_S if engine == ENDPOINT else None
        found.append(row(f"voice, {engine}: first sound: p{percent}", value, "s", at_most=target))
    for percent in (50, 95):
        value, note = percentile(frames, percent), "bound: promised for audio that is sent at once"
        target = bound_s + TARGET_S if bound_s and engine == ENDPOINT else None
        figure = f"voice, {engine}: first frame: p{percent}"
        found.append(row(figure, value, "s", at_most=target, bound=bound_s or None, note=note))
    return found


@asynccontextmanager
async def instant_endpoint() -> AsyncGenerator[str, None]:
    """Serve an OpenAI-compatible speech endpoint that answers two seconds of a tone at once; yield its address."""

    async def speech(_: web.Request) -> web.Response:
        return web.Response(body=b"\xff\x1f" * 48000, content_type="audio/pcm")

    app = web.Application()
    app.router.add_post("/v1/audio/speech", speech)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
    await runner.setup()
    try:
        port = free_ports(1)[0]
        await web.TCPSite(runner, "127.0.0.1", port, reuse_address=True).start()
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        await runner.cleanup()
