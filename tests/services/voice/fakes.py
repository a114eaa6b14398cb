"""Stand-ins of speech engines: one in this process, an OpenAI-compatible endpoint, and a command."""

import asyncio
import json
import shlex
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import web

from avatar.errors import VoiceFailed
from avatar.rpc.server import serving
from avatar.store.sessions import SessionStore
from services.registration import registered
from services.voice.engines import Command, Sound
from services.voice.service import IDLE_S, VoiceServicer
from services.voice.sound import Samples

RATE_HZ = 16000
CHAR_S = 0.05


def spoken(sentence: str, rate_hz: int = RATE_HZ, char_s: float = CHAR_S) -> Samples:
    """The sound of a sentence: a tone that depends on its characters, `char_s` each."""
    tones = [np.full(round(char_s * rate_hz), 0.1 + 0.8 * (ord(each) % 64) / 64) for each in sentence]
    return np.concatenate(tones).astype(np.float32)


def pcm16(samples: Samples) -> bytes:
    return np.round(samples * 32767).astype("<i2").tobytes()


class ToneEngine:
    """Speaks with `spoken`, in parts of `part_s`, and records the sentences that it begins and all parts that it makes.

    char_s: seconds of a character. mute: sentences that it makes no sound of. failure: raised by the next sentences,
    after `failure_after` parts. before: awaited before each part.
    """

    name = "tone"

    def __init__(self, languages: Sequence[str] = (), part_s: float = 0.2) -> None:
        self.languages = languages
        self.sentences: list[str] = []
        self.spoken_languages: list[str] = []
        self.num_parts = 0
        self.char_s = CHAR_S
        self.mute: Collection[str] = ()
        self.failure: VoiceFailed | None = None
        self.failure_after = 0
        self.before: Callable[[], Awaitable[Any]] | None = None
        self._part = round(part_s * RATE_HZ)

    async def speak(self, sentence: str, language: str) -> AsyncGenerator[Sound, None]:
        self.sentences.append(sentence)
        self.spoken_languages.append(language)
        if sentence in self.mute:
            yield Sound(np.zeros(0, np.float32), RATE_HZ, is_last=True)
            return
        samples = spoken(sentence, char_s=self.char_s)
        for at, start in enumerate(range(0, len(samples), self._part)):
            if self.before:
                await self.before()
            if self.failure and at >= self.failure_after:
                raise self.failure
            self.num_parts += 1
            yield Sound(samples[start : start + self._part], RATE_HZ)


async def spoken_by(line: str, *sentences: str) -> bytes:
    """The sound of sentences by a command line, as PCM16."""
    engine = Command(line, (), 10)
    return b"".join([pcm16(sound.samples) for each in sentences async for sound in engine.speak(each, "")])


@asynccontextmanager
async def voice_worker(
    store: SessionStore, engine: Any, capacity: int = 8, idle_s: float = IDLE_S
) -> AsyncGenerator[str, None]:
    """HOST:PORT of a voice worker over an engine, registered in the store."""
    servicer = VoiceServicer(engine, capacity, idle_s)
    async with serving("127.0.0.1:0", servicer) as port:
        target = f"127.0.0.1:{port}"
        async with registered(store.workers("main"), target, servicer):
            yield target


class FakeEndpoint:
    """An OpenAI-compatible speech endpoint, which records requests and their keys.

    part_bytes, pause_s: size of the parts of its sound, and the pause before each but the first.
    """

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.status = 200
        self.content_type = "audio/pcm"
        self.body: bytes | None = None
        self.after_first_part: asyncio.Event | None = None
        self.is_cut_short = False
        self.part_bytes, self.pause_s = 1 << 20, 0.0

    async def speech(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        self.requests.append(body)
        self.keys.append(request.headers.get("Authorization", ""))
        if self.status != 200:
            text = f"wrong key {self.keys[-1]} for {body['input']}"
            return web.Response(status=self.status, text=text, headers={"Location": "/elsewhere"})
        response = web.StreamResponse(headers={"Content-Type": self.content_type})
        await response.prepare(request)
        data = self.body if self.body is not None else pcm16(spoken(body["input"], 24000))
        await response.write(data[:4801])  # half a sample, too
        if self.after_first_part:
            await self.after_first_part.wait()
        if self.is_cut_short:
            assert request.transport
            request.transport.close()
            return response
        for start in range(4801, len(data), self.part_bytes):
            await asyncio.sleep(self.pause_s)
            await response.write(data[start : start + self.part_bytes])
        return response

    @asynccontextmanager
    async def serving(self) -> AsyncGenerator[str, None]:
        """The base URL."""
        app = web.Application()
        app.router.add_post("/v1/audio/speech", self.speech)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
        await runner.setup()
        assert runner.server
        try:
            listener = await asyncio.get_running_loop().create_server(runner.server, "127.0.0.1", 0)
            yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1"
            listener.close()
        finally:
            await runner.cleanup()


COMMAND = """
import sys, wave
text, path = sys.argv[1], sys.argv[2]
with wave.open(path, "wb") as file:
    file.setparams((1, 2, 16000, 0, "NONE", ""))
    file.writeframes(b"".join(bytes([ord(each) % 256, 40]) * 800 for each in text))
"""


def command(folder: Path, program: str = COMMAND, arguments: str = "{text} {wav}") -> str:
    """The command line of a small Python program that speaks its first argument into the file of its second."""
    path = folder / "speak.py"
    path.write_text(program)
    return f"{shlex.quote(sys.executable)} -S {shlex.quote(str(path))} {arguments}"
