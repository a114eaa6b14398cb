"""One session's stream: audio in, typed items out.

A reader task receives messages and queues their items until they are iterated. Written requests are kept for a while:
if the connection breaks, the reader opens another call, sends the undelivered requests again, and skips items that
have already arrived.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from contextlib import nullcontext, suppress
from typing import TypeAlias

import grpc.aio

from avatar.aio import ChangeSignal, background
from avatar.client.connection import Connection
from avatar.client.items import (
    Audio,
    Frame,
    Interrupted,
    Item,
    PlaybackFinished,
    PlaybackStarted,
    WordStarted,
    interrupted_from_pb,
    items_from_pb,
)
from avatar.client.send_queue import AudioLead, SendQueue
from avatar.errors import (
    AvatarError,
    ConnectionLost,
    NoCapacity,
    ProtocolOrder,
    SessionBusy,
    StageLost,
    StoreUnavailable,
)
from avatar.rpc.status import ENDED_EARLY, CallStatus, error_of
from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import types_pb2 as types

OPEN_S = 60.0
PIECE_S = 0.1
# Items queued before reading pauses; a stream of single frames has 25 a second and more.
MAX_QUEUED_ITEMS = 64
# Delay between attempts to resume: the first and the longest, in seconds. The last attempt is made LAST_S before the
# gateway forgets the stream.
RETRY_S, MAX_RETRY_S = 0.1, 0.5
LAST_S = 0.1
MARKS = {types.MARK_XMP: "xmp", types.MARK_SEI: "sei", types.MARK_LABEL: "label"}
SAMPLE_BYTES = {types.SAMPLE_ENCODING_PCM16: 2, types.SAMPLE_ENCODING_FLOAT32: 4}


AudioSource: TypeAlias = bytes | Iterable[bytes] | AsyncIterable[bytes]


class Stream:
    """An open stream. Iterate it for all items, or `frames()` for frames alone.

    One task may push audio while another iterates. Every method raises the AvatarError that ended the stream.

    init_segment: initialization segment of fragmented MP4. marks: those in the frames which say that a machine made
    them, of "xmp", "sei" and "label"; see the enum `Mark`. closed: the gateway's summary, set once all frames have
    arrived.
    """

    def __init__(self, connection: Connection, opening: pb.OpenAvatar, limits: pb.GetCapabilitiesResponse) -> None:
        self.init_segment = b""
        self.marks: frozenset[str] = frozenset()
        self.closed: pb.AvatarClosed | None = None
        self._connection = connection
        self._opening = opening
        self._resume_s = limits.resume_s
        self._sample_bytes = SAMPLE_BYTES[opening.audio.encoding] * opening.audio.num_channels
        self._piece_bytes, self._heard_bytes = (
            min(round(rate_hz * PIECE_S), limits.max_audio_bytes // self._sample_bytes) * self._sample_bytes
            for rate_hz in (opening.audio.rate_hz, opening.listen.rate_hz or opening.audio.rate_hz)
        )
        self._lead = AudioLead(opening, limits)
        self._changed = ChangeSignal()
        # Received.
        self._items: deque[Item] = deque()
        self._is_iterated = False
        self._failure: Exception | None = None
        self._next_frame = 0
        self._next_event = 0
        # Turn and place in it of the last event of each kind.
        self._last_places: dict[type[Item], tuple[int, int]] = {}
        self._last_audio_s = -1.0
        # Sent, one request at a time.
        self._send_lock = asyncio.Lock()
        self._requests = SendQueue()
        self._num_interrupts = 0
        self._is_interrupting = False
        self._interrupted: Interrupted | None = None
        self._is_closing = False

    @property
    def has_ended(self) -> bool:
        """True if the gateway sends nothing more."""
        return self.closed is not None or self._failure is not None

    async def push(self, data: bytes) -> None:
        """Send audio of any length. Returns once it is written; a live stream first waits until the gateway accepts it.

        data: samples in the stream's format, whole ones of every channel. An interrupt drops audio that is not yet
        written. Raises ValueError for a partial sample.
        """
        self._check_samples(data)
        num_interrupts = self._num_interrupts
        async with self._send_lock:
            for start in range(0, len(data), self._piece_bytes):
                piece = data[start : start + self._piece_bytes]
                num_samples = len(piece) // self._sample_bytes
                await self._changed.wait_until(
                    lambda n=num_samples: (  # type: ignore[misc]
                        self._lead.has_room(n) or self._num_interrupts > num_interrupts or self.has_ended
                    )
                )
                if self._num_interrupts > num_interrupts:
                    return
                self._lead.add(num_samples)
                await self._send(pb.StreamAvatarRequest(audio=pb.AudioPiece(data=piece)))

    def _check_samples(self, data: bytes) -> None:
        if len(data) % self._sample_bytes:
            raise ValueError(f"audio must be whole samples of {self._sample_bytes} bytes, got {len(data)} bytes")

    async def say(self, text: str, *, turn: int | None = None, language: str = "") -> None:
        """Send text for the deployment's voice to speak as a turn's audio, in pieces of any size.

        It is spoken a sentence at a time, and the last one at `end_turn`. An interrupt drops text that is not yet
        written. A notice reports text that cannot be spoken, and the stream goes on.

        turn: number of the turn that it belongs to, by default the current one; text of a turn that is over is
        discarded. language: a BCP 47 tag such as `en`, in the turn's first piece; by default the voice's. Raises
        VoiceUnsupported if there is no voice, and ValueError for half of a surrogate pair, which is no text.
        """
        text.encode()  # the message could not carry it either, and less would be known of why
        num_interrupts = self._num_interrupts
        async with self._send_lock:
            if text and self._num_interrupts == num_interrupts:
                self._lead.say()
                await self._send(pb.StreamAvatarRequest(say=pb.SayText(text=text, turn=turn, language=language)))

    async def listen(self, data: bytes) -> None:
        """Send audio of the person whom the avatar talks to, of any length. Returns once it is written.

        Live, send it in real time, as it is recorded, whatever else is sent meanwhile; offline, send it before the
        audio of the same time. An interrupt does not concern it.

        data: samples in the stream's format, at its `listen_rate_hz`, whole ones of every channel. Raises ValueError
        for a partial sample. If the checkpoint does not listen, which `Avatar.capabilities` says, the stream ends with
        ListenUnsupported.
        """
        self._check_samples(data)
        for start in range(0, len(data), self._heard_bytes):
            piece = pb.HeardAudio(data=data[start : start + self._heard_bytes])
            await self._send(pb.StreamAvatarRequest(listen=piece))

    async def end_turn(self) -> None:
        """End the turn: its audio is spoken to the end without waiting for more. Later audio is another turn."""
        async with self._send_lock:
            self._lead.end_turn()
            await self._send(pb.StreamAvatarRequest(end_turn=pb.EndTurn()))

    async def interrupt(self) -> Interrupted:
        """Drop audio that is not yet being rendered and frames that are not yet sent, and return the position.

        Audio pushed in the meantime waits for the answer and is spoken after it.
        """
        self._num_interrupts += 1
        self._changed.notify()
        async with self._send_lock:
            self._is_interrupting, self._interrupted = True, None
            try:
                await self._send(pb.StreamAvatarRequest(interrupt=pb.InterruptAvatar()))
                await self._changed.wait_until(lambda: self._interrupted or self.has_ended)
                if not self._interrupted:
                    raise self._failure or ProtocolOrder("the stream ended before the interrupt was answered")
                return self._interrupted
            finally:
                self._is_interrupting = False

    async def close(self) -> None:
        """End the audio. The remaining frames arrive, then the iteration ends."""
        async with self._send_lock:
            if not self._is_closing:
                await self._send(pb.StreamAvatarRequest(close=pb.CloseAvatar()))
                self._is_closing = True

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Item:
        self._is_iterated = True
        await self._changed.wait_until(lambda: self._items or self.has_ended)
        if self._items:
            self._changed.notify()
            return self._items.popleft()
        if self._failure:
            raise self._failure
        raise StopAsyncIteration

    async def frames(self) -> AsyncGenerator[Frame, None]:
        """Yield the frames and skip all other items."""
        async for item in self:
            if isinstance(item, Frame):
                yield item

    async def run(self, audio: AudioSource | None = None) -> None:
        """Read and write until the stream has ended, and push `audio` if it is given. The stream must be open."""
        async with background(self._push_all(audio)) if audio is not None else nullcontext():
            try:
                while True:
                    async with background(self._write_requests()):
                        lost = await self._read_responses()
                    if self.has_ended:
                        break
                    await self._resume(lost)
            except AvatarError as error:
                self._fail(error)
            self._changed.notify()

    async def open(self, *, is_resume: bool = False) -> pb.AvatarOpened:
        """Open a call. Raises the gateway's error, or ConnectionLost if it is unreachable."""
        self._call = self._connection.stub.StreamAvatar(metadata=self._connection.metadata(self._opening.session_id))
        self._status = CallStatus(self._call)
        opening = pb.OpenAvatar()
        opening.CopyFrom(self._opening)
        if is_resume:
            opening.resume.next_frame, opening.resume.next_event = self._next_frame, self._next_event
        try:
            async with asyncio.timeout(OPEN_S):
                with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # reading raises the call's status
                    await self._call.write(pb.StreamAvatarRequest(open=opening))
                await self._call.initial_metadata()  # reading swallows a cancellation until they are there
                response = await anext(aiter(self._call), None)
        except TimeoutError as error:
            self._call.cancel()
            raise ConnectionLost(f"the gateway did not open a stream in {OPEN_S:g} s") from error
        except (grpc.aio.AioRpcError, asyncio.CancelledError) as error:
            raise await self._call_error(error) from error
        if not isinstance(response, pb.StreamAvatarResponse):
            raise ConnectionLost(ENDED_EARLY)
        opened = response.opened
        if not is_resume:
            self._next_frame = opened.session.next_frame
            self.init_segment = opened.init_segment
        # Another gateway may mark otherwise.
        self.marks = frozenset(MARKS[mark] for mark in opened.marks if mark in MARKS)
        return opened

    async def _read_responses(self) -> ConnectionLost:
        """Read until the call ends, and return the lost connection. Raises any other error of the gateway."""
        try:
            async for response in self._call:
                if not isinstance(response, pb.StreamAvatarResponse):  # it cannot be parsed
                    break
                self._receive(response)
                self._changed.notify()
                await self._changed.wait_until(
                    lambda: len(self._items) < MAX_QUEUED_ITEMS or not self._is_iterated or self._is_interrupting
                )
        except (grpc.aio.AioRpcError, asyncio.CancelledError) as problem:
            error = await self._call_error(problem)
            if not isinstance(error, ConnectionLost):
                raise error from problem
            return error
        return ConnectionLost(ENDED_EARLY)

    async def _call_error(self, problem: BaseException) -> AvatarError:
        """Return the error that ended the call. Raises CancelledError if this task was cancelled, not the call."""
        _raise_if_cancelled(problem)
        own = problem if isinstance(problem, grpc.aio.AioRpcError) else None
        ended = await self._status.instead_of(own) if own else self._status.ended
        return error_of(ended) if ended else ConnectionLost(ENDED_EARLY)

    def _receive(self, response: pb.StreamAvatarResponse) -> None:
        """Record a message, and queue its items unless they arrived before a resume."""
        match response.WhichOneof("part"):
            case "closed":
                self.closed = response.closed
            case "interrupted":
                self._lead.reset()
                if self._is_interrupting:
                    self._requests.discard()
                self._interrupted = interrupted_from_pb(response.interrupted)
        self._items.extend(item for item in items_from_pb(response) if self._is_new(item))

    def _is_new(self, item: Item) -> bool:
        """Return whether an item has not arrived before the connection broke, and record it."""
        match item:
            case Frame():
                if item.index < self._next_frame:
                    return False
                self._next_frame = item.index + item.num_frames
            case Audio():
                if item.pts_s <= self._last_audio_s:
                    return False
                self._last_audio_s = item.pts_s
            case _:
                if item.number < self._next_event:
                    return False
                self._next_event = item.number + 1
                if isinstance(item, PlaybackStarted | PlaybackFinished | WordStarted):
                    # Another gateway repeats what its record does not have, under new numbers.
                    place = item.turn, item.first_char if isinstance(item, WordStarted) else 0
                    if place <= self._last_places.get(type(item), (-1, 0)):
                        return False
                    self._last_places[type(item)] = place
        self._lead.update(item)
        return True

    async def _write_requests(self) -> None:
        """Write requests until the call ends; the reader reports how it ended."""
        while True:
            await self._changed.wait_until(self._requests.has_next)
            try:
                request = self._requests.take()
                self._changed.notify()
                await self._call.write(request)
            except (grpc.aio.AioRpcError, asyncio.CancelledError, asyncio.InvalidStateError) as problem:
                _raise_if_cancelled(problem)
                return

    async def _resume(self, lost: ConnectionLost) -> None:
        """Open another call that continues the lost one. Raises `lost` after the gateway's `resume_s`."""
        deadline, delay_s = time.monotonic() + self._resume_s, RETRY_S
        while True:
            try:
                # A call fails at once while the channel waits for its next attempt to connect, so wait with it.
                async with asyncio.timeout(deadline - time.monotonic()):
                    await self._connection.ready()
                opened = await self.open(is_resume=True)
            except TimeoutError:
                raise lost from None
            except (ConnectionLost, NoCapacity, SessionBusy, StageLost, StoreUnavailable):
                # SessionBusy: the gateway has not detected the broken connection yet. StageLost: it has just started,
                # or its workers fail over; the session is still where it was.
                left_s = deadline - time.monotonic() - LAST_S
                if left_s <= 0:
                    raise lost from None
                await asyncio.sleep(min(delay_s, left_s))
                delay_s = min(2 * delay_s, MAX_RETRY_S)
            else:
                self._requests.rewind(opened.num_messages)
                return

    async def _send(self, request: pb.StreamAvatarRequest) -> None:
        """Queue a request and wait until it is written or discarded. Raises the error that ended the stream, if any."""
        if self._is_closing and not self._failure:
            raise ProtocolOrder("the stream was closed: nothing can be sent on it")
        queued = self._requests.add(request)
        self._changed.notify()
        await self._changed.wait_until(lambda: queued.is_done or self.has_ended)
        if self._failure:
            raise self._failure

    async def _push_all(self, audio: AudioSource) -> None:
        """Push all audio and close the stream. An exception of the source ends the stream."""
        try:
            if isinstance(audio, AsyncIterable):
                async for piece in audio:
                    await self.push(piece)
            else:
                for piece in [audio] if isinstance(audio, bytes) else audio:
                    await self.push(piece)
            await self.close()
        except AvatarError:
            pass  # the stream has ended; the iterator re-raises the error
        except Exception as error:
            self._fail(error)
            self._call.cancel()

    def _fail(self, failure: Exception) -> None:
        self._failure = self._failure or failure
        self._changed.notify()


def _raise_if_cancelled(problem: BaseException) -> None:
    """Raise CancelledError if this task was cancelled, not the call: grpc.aio swallows it while a call starts."""
    if (task := asyncio.current_task()) and task.cancelling():
        raise asyncio.CancelledError from problem
