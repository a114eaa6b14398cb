"""The speech engine behind an OpenAI-compatible endpoint: POST /audio/speech, sound as it is made."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from http import HTTPStatus
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp

from avatar.errors import VoiceFailed
from services.voice.engines import Sound
from services.voice.sound import MAX_RATE_HZ, MIN_RATE_HZ, PcmReader

logger = logging.getLogger(__name__)

# Of bare samples whose type names no other: what OpenAI's own endpoint sends.
PCM_RATE_HZ = 24000
MAX_RATE_DIGITS = 6
READ_BYTES = 16 << 10
REASONS = {
    HTTPStatus.UNAUTHORIZED: "refuses the key",
    HTTPStatus.FORBIDDEN: "refuses the key",
    HTTPStatus.NOT_FOUND: "has no such path, model or voice",
    HTTPStatus.TOO_MANY_REQUESTS: "takes no more requests now",
}


class Endpoint:
    """An OpenAI-compatible speech endpoint. A context: its end closes the connections."""

    name = "endpoint"

    def __init__(
        self, url: str, key: Path | None, model: str, voice: str, languages: Sequence[str], timeout_s: float
    ) -> None:
        """url: without `/audio/speech`. key: file that holds the key; read for each request, so that it can be changed.

        timeout_s: for the first sound and between two parts of it. ValueError if the key cannot be used.
        """
        self.languages = languages
        self._url, self._key = f"{url.rstrip('/')}/audio/speech", key
        self._model, self._voice, self._timeout_s = model, voice, timeout_s
        if key is not None:
            _read_key(key)
            parts = urlsplit(url)
            if parts.scheme != "https" and not _is_local(parts.hostname or ""):
                raise ValueError(f"the key would be sent to {parts.hostname} in plain text; use an https:// address")

    async def __aenter__(self) -> "Endpoint":
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._timeout_s, sock_read=self._timeout_s)
        # Turns are limited by the worker's capacity; more would wait in aiohttp's pool, and count as slow.
        self._session = aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def speak(self, sentence: str, language: str) -> AsyncGenerator[Sound, None]:  # noqa: ARG002
        """Yield a sentence's sound as it arrives. The protocol has no language: the endpoint finds it out."""
        body = {"model": self._model, "voice": self._voice, "input": sentence, "response_format": "pcm"}
        try:
            headers = {"Authorization": f"Bearer {_read_key(self._key)}"} if self._key else {}
        except ValueError as error:
            raise VoiceFailed("the file of the speech endpoint's key cannot be used") from error
        try:
            # A redirection would take the key and the text elsewhere.
            async with self._session.post(self._url, json=body, headers=headers, allow_redirects=False) as response:
                reader = _reader(response)
                async for data in response.content.iter_chunked(READ_BYTES):
                    samples = reader.read(data)
                    if len(samples):
                        yield Sound(samples, reader.rate_hz)
        except (aiohttp.ClientError, TimeoutError, asyncio.IncompleteReadError) as error:
            late = isinstance(error, TimeoutError)
            why = f"sends no sound for {self._timeout_s:g} s" if late else f"fails: {type(error).__name__}"
            raise VoiceFailed(f"the speech endpoint {why}") from error


def _reader(response: aiohttp.ClientResponse) -> PcmReader:
    """Return the reader of a response. VoiceFailed if it is no sound.

    Its body is not shown: it may repeat the text, or a part of the key.
    """
    if response.status != HTTPStatus.OK:
        why = REASONS.get(HTTPStatus(response.status)) if response.status in {*HTTPStatus} else None
        raise VoiceFailed(f"the speech endpoint {why or 'fails'} (status {response.status})")
    kind = response.content_type.lower()
    if "wav" in kind:
        return PcmReader()
    if "pcm" not in kind and kind not in ("audio/l16", "application/octet-stream"):
        raise VoiceFailed(f"the speech endpoint sends {kind[:40]}, expected audio/pcm or audio/wav")
    rate_hz = PCM_RATE_HZ
    for part in response.headers.get("Content-Type", "").split(";")[1:]:
        name, _, value = part.strip().partition("=")
        if name.lower() == "rate":
            rate_hz = int(value) if value.isdecimal() and len(value) <= MAX_RATE_DIGITS else 0
        if name.lower() == "channels" and value != "1":
            raise VoiceFailed("the speech endpoint's sound has several channels, expected one")
    if not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ:
        raise VoiceFailed(f"the speech endpoint's sound has {rate_hz} Hz, expected {MIN_RATE_HZ} to {MAX_RATE_HZ}")
    return PcmReader(rate_hz)


def _read_key(path: Path) -> str:
    """Return the key in a file. ValueError if the file cannot be read, or holds none."""
    try:
        key = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{path} cannot be read as a key") from error
    if not key or not key.isprintable() or " " in key:
        raise ValueError(f"{path} must hold one key and nothing else")
    return key


def _is_local(host: str) -> bool:
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return host == "localhost"
