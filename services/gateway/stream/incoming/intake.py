"""Audio on its way into one session: checked, bounded, and acknowledged.

message of the client, or speech of its text -> Intake -> SpeechQueue
                     audio of another person -> Intake -> HeardQueue
"""

import asyncio
from collections.abc import Awaitable, Callable

from avatar.errors import InvalidAudio, ListenUnsupported, MessageTooLarge, ProtocolOrder
from avatar.settings import GatewaySettings
from avatar.v1 import avatar_service_pb2 as api
from services.gateway.options import StreamOptions
from services.gateway.stream.acks import Acks
from services.gateway.stream.in_flight import Turn
from services.gateway.stream.incoming.heard_queue import HeardQueue
from services.gateway.stream.outbox import Outbox, notice
from services.gateway.stream.speech import SpeechQueue


class Intake:
    """Adds audio to one session.

    heard_s: when something last came, or was owed; first_audio_s: when the first audio came, None before; in seconds of
    the clock. has_room: to be set when a block is admitted or dropped.
    """

    def __init__(
        self,
        options: StreamOptions,
        settings: GatewaySettings,
        speech: SpeechQueue,
        heard: HeardQueue,
        acks: Acks,
        outbox: Outbox,
        now: Callable[[], float],
    ) -> None:
        """now: clock, in seconds."""
        self.has_room = asyncio.Event()
        self.heard_s = now()
        self.first_audio_s: float | None = None
        self._options, self._settings, self._now = options, settings, now
        self._speech, self._heard, self._acks, self._outbox = speech, heard, acks, outbox

    async def add(self, data: bytes) -> int:
        """Add audio of the client to the current turn and return how many of its samples are accepted.

        Offline, wait until there is room. A piece without samples has no effect.
        """
        self._check("audio.data", data, sample_bytes := self._options.sample_bytes)
        if not data:
            return 0
        if self._speech.turn.text:
            raise ProtocolOrder("the turn has text; end it before audio")
        num_samples = len(data) // sample_bytes
        if not self._options.is_live:
            await self._wait_for_room(self._speech.turn)
        elif self._speech.pending_samples + num_samples > self._settings.live_ahead_s * self._options.rate_hz:
            message = f"{self._settings.live_ahead_s:g} s of audio are waiting"
            self._outbox.put(notice(api.Notice.KIND_AUDIO_REFUSED, message, num_samples=num_samples))
            return 0
        self._speech.turn.has_audio = True
        self._add(data, self._speech.turn)
        return num_samples

    def add_heard(self, data: bytes, *, is_offered: bool) -> None:
        """Add audio of the other person. ListenUnsupported if the checkpoint does not listen."""
        if not is_offered:
            raise ListenUnsupported("this deployment's checkpoint does not listen; send no `listen`")
        self._check("listen.data", data, self._options.heard.sample_bytes)
        self._heard.add(data)

    def _check(self, field: str, data: bytes, sample_bytes: int) -> None:
        """Raise MessageTooLarge or InvalidAudio if audio cannot be taken."""
        if len(data) > self._settings.max_audio_bytes:
            raise MessageTooLarge(f"{len(data)} bytes of audio at once, the limit is {self._settings.max_audio_bytes}")
        if len(data) % sample_bytes:
            raise InvalidAudio.at(field, f"{len(data)} bytes are no multiple of {sample_bytes}")

    async def add_spoken(self, use_audio: Callable[[float], Awaitable[None]], data: bytes, turn: Turn) -> None:
        """Add speech of a turn's text, once there is room. use_audio: counts its seconds."""
        num_samples = len(data) // self._options.sample_bytes
        await use_audio(num_samples / self._options.rate_hz)
        await self._wait_for_room(turn)
        self._acks.spoken(num_samples)
        self._add(data, turn)

    def _add(self, data: bytes, turn: Turn) -> None:
        """Add audio to a turn, without the samples that another gateway has delivered."""
        self.heard_s = self._now()
        self.first_audio_s = self.first_audio_s or self.heard_s
        sample_bytes = self._options.sample_bytes
        self._speech.add(data[self._acks.skip(turn.number, len(data) // sample_bytes) * sample_bytes :], turn)

    async def _wait_for_room(self, turn: Turn) -> None:
        """Wait until less audio than `audio_ahead_s`, up to the end of a turn, is ahead of the admitted blocks."""
        limit = self._settings.audio_ahead_s * self._options.rate_hz
        while self._speech.ahead_of(turn) >= limit:
            self.has_room.clear()
            await self.has_room.wait()
