"""One browser's session: a WebRTC connection on one side, a live stream of the gateway on the other.

    microphone, clip, text -> PendingSpeech -> stream -> Playout -> video and audio track

The microphone has two uses: its audio is spoken by the avatar, or the avatar listens to it. It arrives as an audio
track. Everything else uses a data channel that the browser opens: binary messages are mono PCM16 at `RATE_HZ`, text
messages are JSON objects with a `type`.

    from the browser  end_turn | interrupt | microphone {use: speak, talk, off} | text {text}
    to the browser    state {state: idle, preparing, speaking} | notice {text} | ended {text}
                      turn {text}: a turn is queued; without `text`, one of audio
                      reaction {seconds}: its speech begins | finished | unspoken: it had nothing to speak
                      interrupted {position_s, was_speaking, spoken}: all queued turns are dropped
"""

import asyncio
import json
import logging
import time
from collections import deque
from contextlib import suppress
from typing import Any

from aiortc import MediaStreamTrack, RTCDataChannel, RTCPeerConnection
from aiortc.mediastreams import MediaStreamError
from av import AudioFrame, AudioResampler

from avatar.aio import background
from avatar.client import (
    AvatarError,
    Frame,
    Interrupted,
    Item,
    Notice,
    NoticeKind,
    PlaybackFinished,
    PlaybackStarted,
    Session,
    Stream,
)
from web.pending_speech import PendingSpeech
from web.playout import RATE_HZ, SAMPLE_BYTES, AudioTrack, Playout, VideoTrack
from web.words import error_words, notice_words

logger = logging.getLogger(__name__)

CONNECT_S = 20.0
# Audio that may wait for the gateway: a clip of a minute, but only a short backlog of the microphone.
MAX_PENDING_S, MAX_MICROPHONE_S = 60.0, 0.5
# Time for the last message to be sent before the connection closes.
CLOSE_S = 0.3
MAX_COMMANDS = 32
# A message from the browser: the size that WebRTC's description promises to take.
MAX_MESSAGE_BYTES = 64 << 10
# Messages to a browser that does not read them are dropped beyond this.
MAX_UNREAD_BYTES = 64 << 10
MAX_TURNS = 512


class BrowserSession:
    """A session with one browser. Its tracks are added to `peer` at once; `run` does the rest."""

    def __init__(self, peer: RTCPeerConnection, session: Session, *, listens: bool = False) -> None:
        """listens: the deployment does, so that the microphone may be used to talk to the avatar."""
        self._peer, self._session, self._listens = peer, session, listens
        self._channel: RTCDataChannel | None = None
        self._microphone: MediaStreamTrack | None = None
        self._connected, self._closed = asyncio.Event(), asyncio.Event()
        self._commands: asyncio.Queue[dict[str, Any]] = asyncio.Queue(MAX_COMMANDS)
        self._pending = PendingSpeech(MAX_PENDING_S)
        self._heard = PendingSpeech(MAX_MICROPHONE_S)
        self._microphone_use = "off"
        self._is_refusing = self._is_in_turn = False
        # Arrival of the first piece of each turn that is not yet shown.
        self._turn_starts: deque[float] = deque(maxlen=MAX_TURNS)
        self._state = ""
        self._playout = Playout(self._on_item)
        # Send only: nobody reads a video of the browser's, so its frames would pile up.
        peer.addTransceiver(VideoTrack(self._playout, session.video.width, session.video.height), "sendonly")
        peer.addTrack(AudioTrack(self._playout))
        peer.on("connectionstatechange", self._on_connection_state)
        peer.on("track", self._on_track)
        peer.on("datachannel", self._on_channel)

    async def run(self) -> None:
        """Run until the browser leaves or the gateway ends the stream, then close the connection."""
        try:
            async with asyncio.timeout(CONNECT_S):
                await self._connected.wait()
            async with self._session.stream(rate_hz=RATE_HZ, live=True, return_audio=True) as stream:
                await self._run_stream(stream)
        except TimeoutError:
            logger.info("a browser did not connect")
            with suppress(AvatarError):
                await self._session.delete()
        except AvatarError as error:
            logger.info("a browser's session ended", extra={"reason": error.reason, **stage_of(error)})
            self._send("ended", text=error_words(error))
            await asyncio.sleep(CLOSE_S)
        finally:
            await self._peer.close()

    async def _run_stream(self, stream: Stream) -> None:
        """Run all tasks of a stream until the first one ends."""
        async with (
            background(self._play(stream)) as playing,
            background(self._push_speech(stream)) as pushing,
            background(self._run_commands(stream)) as commands,
            background(self._read_microphone()) as microphone,
            background(self._push_heard(stream)) as listening,
            background(self._until_closed()) as closed,
        ):
            tasks = {playing, pushing, commands, microphone, listening, closed}
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for each in done:
                each.result()

    async def _until_closed(self) -> None:
        await self._closed.wait()

    async def _play(self, stream: Stream) -> None:
        async for item in stream:
            await self._playout.put(item)

    async def _push_speech(self, stream: Stream) -> None:
        while True:
            match await self._pending.get():
                case bytes(data):
                    await stream.push(data)
                case str(text):
                    await stream.say(text)
                case None:
                    await stream.end_turn()

    async def _push_heard(self, stream: Stream) -> None:
        while True:
            data = await self._heard.get()
            assert isinstance(data, bytes)
            await stream.listen(data)

    async def _read_microphone(self) -> None:
        """Add the microphone's audio while it is on, to what is spoken or to what the avatar listens to."""
        resampler = AudioResampler(format="s16", layout="mono", rate=RATE_HZ)
        try:
            while self._microphone:
                frame = await self._microphone.recv()
                assert isinstance(frame, AudioFrame)
                pieces = resampler.resample(frame)
                data = b"".join(bytes(each.planes[0])[: each.samples * SAMPLE_BYTES] for each in pieces)
                if self._microphone_use == "speak" and self._pending.seconds < MAX_MICROPHONE_S:
                    self._add_audio(data)
                elif self._microphone_use == "talk" and data and not self._heard.is_full:
                    self._heard.put(data)
        except MediaStreamError:
            pass  # the browser has removed its track
        await self._closed.wait()

    async def _run_commands(self, stream: Stream) -> None:
        while True:
            match await self._commands.get():
                case {"type": "interrupt"}:
                    await self._interrupt(stream)
                case {"type": "microphone", "use": "talk"} if not self._listens:
                    self._send("notice", text="This avatar does not listen.")
                case {"type": "microphone", "use": "speak" | "talk" | "off" as use}:
                    if self._microphone_use == "speak" and use != "speak":
                        self._end_turn()
                    self._microphone_use = use
                case {"type": "end_turn"}:
                    self._is_refusing = False
                    self._end_turn()
                case {"type": "text", "text": str(text)}:
                    # JSON may hold halves of surrogate pairs, which are no text.
                    self._say(text.encode(errors="replace").decode())
                case {"type": str(kind)}:
                    self._send("notice", text=f"Unknown or incomplete command: {kind[:40]}.")
                case _:
                    self._send("notice", text="A command needs a `type`.")

    async def _interrupt(self, stream: Stream) -> None:
        """Stop the speech: locally at once, at the gateway as soon as it answers."""
        self._pending.clear()
        self._turn_starts.clear()
        self._is_in_turn = False
        self._playout.drop()
        interrupted: Interrupted = await stream.interrupt()
        self._playout.drop()
        position = {"position_s": interrupted.position_s, "spoken": interrupted.spoken}
        self._send("interrupted", was_speaking=interrupted.was_speaking, **position)
        self._set_state("idle")

    def _add_audio(self, data: bytes) -> None:
        """Queue audio of the open turn, or of a new one."""
        if data and self._add(data) and not self._is_in_turn:
            self._is_in_turn = True
            self._begin_turn()

    def _say(self, text: str) -> None:
        """Queue a text as a turn of its own."""
        self._end_turn()
        if text and self._add(text):
            self._begin_turn(text=text)
            self._pending.put(None)

    def _begin_turn(self, **content: str) -> None:
        self._turn_starts.append(time.monotonic())
        self._send("turn", **content)
        if self._state == "idle":
            self._set_state("preparing")

    def _add(self, item: bytes | str) -> bool:
        """Queue audio or a text. Returns False, with a notice for the first, if too much is pending."""
        if self._pending.is_full:
            if not self._is_refusing:
                text = f"Only {MAX_PENDING_S:g} seconds of speech can be queued; the rest is dropped."
                self._send("notice", text=text)
            self._is_refusing = True
            return False
        self._pending.put(item)
        return True

    def _end_turn(self) -> None:
        """End the open turn. Without one there is nothing to say, and nothing to queue."""
        if self._is_in_turn:
            self._is_in_turn = False
            self._pending.put(None)

    def _on_item(self, item: Item) -> None:
        """Report an item that is due to the browser."""
        match item:
            case Frame(is_idle=is_idle):
                waiting = "preparing" if self._turn_starts else "idle"
                self._set_state(waiting if is_idle else "speaking")
            case PlaybackStarted() if self._turn_starts:
                self._send("reaction", seconds=time.monotonic() - self._turn_starts.popleft())
            case PlaybackFinished(position_s=0.0, was_interrupted=False) if self._turn_starts:
                self._turn_starts.popleft()
                self._send("unspoken")
            case PlaybackFinished(was_interrupted=False):
                self._send("finished")
            case Notice(kind=NoticeKind.TOO_SLOW):
                pass  # the answer to the offer says it, and its text stays
            case Notice():
                self._send("notice", text=notice_words(item))

    def _set_state(self, state: str) -> None:
        if state != self._state:
            self._state = state
            self._send("state", state=state)

    def _send(self, kind: str, **fields: Any) -> None:
        """Send a message to the browser, if the channel is open and the browser reads it."""
        channel = self._channel
        if channel and channel.readyState == "open" and channel.bufferedAmount < MAX_UNREAD_BYTES:
            channel.send(json.dumps({"type": kind, **fields}))

    def _on_connection_state(self) -> None:
        match self._peer.connectionState:
            case "connected":
                self._connected.set()
            case "failed" | "closed":
                self._closed.set()

    def _on_track(self, track: MediaStreamTrack) -> None:
        if track.kind == "audio":
            self._microphone = track

    def _on_channel(self, channel: RTCDataChannel) -> None:
        """Use the first channel; close others."""
        if self._channel:
            channel.close()
            return
        self._channel = channel
        channel.on("message", self._on_message)
        channel.on("close", self._closed.set)
        if self._state:
            self._send("state", state=self._state)

    def _on_message(self, message: bytes | str) -> None:
        """Add audio at once and queue commands in order. Messages that are neither are refused with a notice."""
        if len(message) > MAX_MESSAGE_BYTES:
            self._send("notice", text=f"A message can have {MAX_MESSAGE_BYTES >> 10} KiB; a longer one is dropped.")
        elif isinstance(message, bytes):
            self._add_audio(message[: len(message) // SAMPLE_BYTES * SAMPLE_BYTES])
        elif (command := command_from_json(message)) is None:
            self._send("notice", text="A command must be a JSON object, and cannot be nested deeply.")
        elif not self._commands.full():
            self._commands.put_nowait(command)


def stage_of(error: AvatarError) -> dict[str, str]:
    """Return what a log may say of an error; its message may have the session's id, and anyone with it can stream."""
    return {key: value for key, value in error.metadata.items() if key == "stage"}


def command_from_json(message: str) -> dict[str, Any] | None:
    """Return a JSON object, or None if the message is none."""
    try:
        command = json.loads(message)
    except (ValueError, RecursionError):
        return None
    return command if isinstance(command, dict) else None
