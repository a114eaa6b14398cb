"""One browser's conversation: a WebRTC connection on one side, a live stream of the gateway on the other.

    microphone, clip, text -> waiting -> stream -> Playout -> picture and voice

The microphone comes as an audio track. Everything else goes over a data channel that the browser makes: binary messages
are mono PCM16 at `RATE_HZ`, text messages are JSON objects with a `type`.

    browser -> us   end_turn | interrupt | microphone {is_on} | text {text}
    us -> browser   state {state: idle, speaking, interrupted} | reaction {seconds} | interrupted {position_s}
                    notice {text} | ended {text}
"""

import asyncio
import json
import logging
import time
from collections import deque
from typing import Any

from aiortc import MediaStreamTrack, RTCDataChannel, RTCPeerConnection
from aiortc.mediastreams import MediaStreamError
from av import AudioFrame

from avatar.aio import background
from avatar.client import AvatarError, Frame, Interrupted, Item, Notice, PlaybackStarted, Session, Stream
from web.playout import RATE_HZ, SAMPLE_BYTES, Picture, Playout, Voice
from web.text_to_speech import MAX_TEXT, Resampler, SpeechError, Synthesiser

logger = logging.getLogger(__name__)

CONNECT_S = 20.0
# Sound that waits for the gateway: a clip of a minute; of a microphone only what a hiccup leaves behind.
MAX_WAITING_S, MAX_HEARD_S = 60.0, 0.5
# What is told last is given so long to be sent.
FAREWELL_S = 0.3
MAX_COMMANDS = 32


class Waiting:
    """What is to be said, in order: sound, texts, and ends of turns (None). Sound is bounded."""

    def __init__(self) -> None:
        self._items: deque[bytes | str | None] = deque()
        self._num_bytes = 0
        self._more = asyncio.Event()

    @property
    def seconds(self) -> float:
        """How much sound waits."""
        return self._num_bytes / SAMPLE_BYTES / RATE_HZ

    def put(self, item: bytes | str | None) -> None:
        """Have something said."""
        self._items.append(item)
        self._num_bytes += len(item) if isinstance(item, bytes) else 0
        self._more.set()

    async def get(self) -> bytes | str | None:
        """What is said next."""
        while not self._items:
            self._more.clear()
            await self._more.wait()
        item = self._items.popleft()
        self._num_bytes -= len(item) if isinstance(item, bytes) else 0
        return item

    def clear(self) -> None:
        """Say nothing of it."""
        self._items.clear()
        self._num_bytes = 0


class Conversation:
    """A conversation with one browser. Its tracks are in `peer` from the beginning; `run` does the rest.

    synthesiser: what makes speech of text, if anything does.
    """

    def __init__(self, peer: RTCPeerConnection, session: Session, synthesiser: Synthesiser | None) -> None:
        self._peer, self._session, self._synthesiser = peer, session, synthesiser
        self._channel: RTCDataChannel | None = None
        self._track: MediaStreamTrack | None = None
        self._connected, self._closed = asyncio.Event(), asyncio.Event()
        self._commands: asyncio.Queue[dict[str, Any]] = asyncio.Queue(MAX_COMMANDS)
        self._waiting = Waiting()
        self._num_interrupts = 0
        self._is_hearing = self._is_refusing = self._is_in_turn = False
        self._begun: deque[float] = deque()  # when the first piece of each turn came that is not yet shown
        self._state = ""
        self._playout = Playout(self._shown)
        peer.addTrack(Picture(self._playout, session.video.width, session.video.height))
        peer.addTrack(Voice(self._playout))
        peer.on("connectionstatechange", self._note_connection)
        peer.on("track", self._note_track)
        peer.on("datachannel", self._note_channel)

    async def run(self) -> None:
        """Converse until the browser leaves or the gateway ends the stream; then everything is closed."""
        try:
            async with asyncio.timeout(CONNECT_S):
                await self._connected.wait()
            async with self._session.stream(rate_hz=RATE_HZ, live=True, return_audio=True) as stream:
                await self._converse(stream)
        except TimeoutError:
            logger.info("a browser did not connect")
        except AvatarError as error:
            self._tell("ended", text=str(error), reason=error.reason)
            await asyncio.sleep(FAREWELL_S)
        finally:
            await self._peer.close()

    async def _converse(self, stream: Stream) -> None:
        async with (
            background(self._show(stream)) as showing,
            background(self._say(stream)) as saying,
            background(self._obey(stream)) as obeying,
            background(self._hear()) as hearing,
            background(self._until_closed()) as closed,
        ):
            done, _ = await asyncio.wait(
                {showing, saying, obeying, hearing, closed}, return_when=asyncio.FIRST_COMPLETED
            )
            for each in done:
                each.result()

    async def _until_closed(self) -> None:
        await self._closed.wait()

    async def _show(self, stream: Stream) -> None:
        async for item in stream:
            await self._playout.put(item)

    async def _say(self, stream: Stream) -> None:
        while True:
            match await self._waiting.get():
                case bytes(data):
                    await stream.push(data)
                case str(text):
                    await self._synthesise(text)
                case None:
                    await stream.end_turn()

    async def _synthesise(self, text: str) -> None:
        num_interrupts = self._num_interrupts
        assert self._synthesiser
        try:
            data = await self._synthesiser.speak(text)
        except SpeechError as error:
            self._tell("notice", text=str(error))
            return
        if self._num_interrupts == num_interrupts:
            self._take(data)
            self._end_turn()

    async def _hear(self) -> None:
        """Take what the microphone hears while it is on."""
        resample = Resampler(RATE_HZ)
        try:
            while self._track:
                frame = await self._track.recv()
                assert isinstance(frame, AudioFrame)
                data = resample(frame)
                if self._is_hearing and self._waiting.seconds < MAX_HEARD_S:
                    self._take(data)
        except MediaStreamError:
            pass  # the browser has taken its track back
        await self._closed.wait()

    async def _obey(self, stream: Stream) -> None:
        while True:
            match await self._commands.get():
                case {"type": "interrupt"}:
                    await self._interrupt(stream)
                case {"type": "microphone", "is_on": bool(is_on)}:
                    if self._is_hearing and not is_on:
                        self._end_turn()
                    self._is_hearing = is_on
                case {"type": "end_turn"}:
                    self._is_refusing = False
                    self._end_turn()
                case {"type": "text", "text": str(text)} if self._synthesiser:
                    self._waiting.put(text[:MAX_TEXT])
                case command:
                    self._tell("notice", text=f"not understood: {command.get('type')!r}"[:80])

    async def _interrupt(self, stream: Stream) -> None:
        """Fall silent: here at once, at the gateway as soon as it answers."""
        self._num_interrupts += 1
        self._waiting.clear()
        self._begun.clear()
        self._is_in_turn = False
        self._playout.drop()
        interrupted: Interrupted = await stream.interrupt()
        self._playout.drop()
        self._tell("interrupted", position_s=interrupted.position_s, was_speaking=interrupted.was_speaking)
        self._enter("interrupted")

    def _take(self, data: bytes) -> None:
        """Have sound said, unless too much waits already."""
        if self._waiting.seconds > MAX_WAITING_S:
            if not self._is_refusing:
                self._tell(
                    "notice", text=f"Only {MAX_WAITING_S:g} seconds can wait to be spoken; the rest is left out."
                )
            self._is_refusing = True
            return
        if not self._is_in_turn:
            self._begun.append(time.monotonic())
            self._is_in_turn = True
        self._waiting.put(data)

    def _end_turn(self) -> None:
        self._is_in_turn = False
        self._waiting.put(None)

    def _shown(self, item: Item) -> None:
        """An item's turn has come."""
        match item:
            case Frame(is_idle=is_idle):
                self._enter("idle" if is_idle else "speaking")
            case PlaybackStarted() if self._begun:
                self._tell("reaction", seconds=time.monotonic() - self._begun.popleft())
            case Notice(message=message):
                self._tell("notice", text=f"{message[:1].upper()}{message[1:].rstrip('.')}.")

    def _enter(self, state: str) -> None:
        if state != self._state:
            self._state = state
            self._tell("state", state=state)

    def _tell(self, kind: str, **fields: Any) -> None:
        """Tell the browser, if it can be told."""
        if self._channel and self._channel.readyState == "open":
            self._channel.send(json.dumps({"type": kind, **fields}))

    def _note_connection(self) -> None:
        match self._peer.connectionState:
            case "connected":
                self._connected.set()
            case "failed" | "closed":
                self._closed.set()

    def _note_track(self, track: MediaStreamTrack) -> None:
        self._track = track

    def _note_channel(self, channel: RTCDataChannel) -> None:
        self._channel = channel
        channel.on("message", self._note_message)
        channel.on("close", self._closed.set)
        if self._state:
            self._tell("state", state=self._state)

    def _note_message(self, message: bytes | str) -> None:
        """Sound is taken at once; commands are obeyed in order. What is no command is ignored."""
        if isinstance(message, bytes):
            self._take(message[: len(message) // SAMPLE_BYTES * SAMPLE_BYTES])
            return
        try:
            command = json.loads(message)
        except ValueError:
            return
        if isinstance(command, dict) and not self._commands.full():
            self._commands.put_nowait(command)
