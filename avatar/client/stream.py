"""One session's stream as a client sees it: sound in, typed items out.

A reader takes what comes from the gateway and keeps it until somebody iterates. What is sent is kept for a while too:
if the connection breaks, the reader opens another call, sends what did not arrive, and drops what comes twice.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, TypeAlias

import grpc.aio

from avatar.aio import background
from avatar.client.items import Audio, Frame, Interrupted, Item, interrupted_of, items_of
from avatar.client.sent import Lead, Sent
from avatar.errors import AvatarError, ConnectionLost, NoCapacity, ProtocolOrder, SessionBusy, StoreUnavailable
from avatar.rpc.status import ENDED_EARLY, CallStatus, error_of
from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import types_pb2 as types

if TYPE_CHECKING:
    from avatar.v1 import avatar_service_pb2_grpc as pb_grpc

OPEN_S = 60.0
PIECE_S = 0.1
# Messages that wait to be iterated before no more are read; a per-frame stream has 25 a second and more.
MAX_WAITING = 64
# Seconds between attempts to resume: the first, and the longest.
RETRY_S, MAX_RETRY_S = 0.1, 2.0
SAMPLE_BYTES = {types.SAMPLE_ENCODING_PCM16: 2, types.SAMPLE_ENCODING_FLOAT32: 4}


Sound: TypeAlias = bytes | Iterable[bytes] | AsyncIterable[bytes]


class Stream:
    """An open stream. Iterate it for everything that comes, or `frames()` for the frames alone.

    Sound may be pushed from one task while another iterates. Any method raises the AvatarError that ended the stream.

    init_segment: what comes before all fragments in fragmented MP4. closed: what was done, once all frames have come.
    """

    def __init__(
        self,
        stub: "pb_grpc.AvatarServiceAsyncStub",
        metadata: Sequence[tuple[str, str]],
        opening: pb.OpenAvatar,
        limits: pb.GetCapabilitiesResponse,
    ) -> None:
        self.init_segment = b""
        self.closed: pb.AvatarClosed | None = None
        self._stub = stub
        self._metadata = metadata
        self._opening = opening
        self._resume_s = limits.resume_s
        self._sample_bytes = SAMPLE_BYTES[opening.audio.encoding] * opening.audio.num_channels
        piece_bytes = min(round(opening.audio.rate_hz * PIECE_S) * self._sample_bytes, limits.max_audio_bytes)
        self._piece_bytes = piece_bytes - piece_bytes % self._sample_bytes
        self._lead = Lead(opening, limits)
        self._changed = Changed()
        # Coming in.
        self._items: deque[Item] = deque()
        self._is_iterated = False
        self._failure: Exception | None = None
        self._next_frame = 0
        self._next_event = 0
        self._last_audio_s = -1.0
        # Going out, one at a time.
        self._ordered = asyncio.Lock()
        self._sent = Sent()
        self._num_interrupts = 0
        self._is_interrupting = False
        self._interrupted: Interrupted | None = None
        self._is_closing = False

    @property
    def has_ended(self) -> bool:
        """Whether nothing more comes from the gateway."""
        return self.closed is not None or self._failure is not None

    async def push(self, data: bytes) -> None:
        """Send sound of any length. Returns once it is on its way: live, no sooner than the gateway takes it.

        data: samples in the stream's format, whole ones of every channel. What is still waiting to be sent when the
        stream is interrupted is dropped. ValueError for a part of a sample.
        """
        if len(data) % self._sample_bytes:
            raise ValueError(f"sound must be whole samples of {self._sample_bytes} bytes, got {len(data)} bytes")
        num_interrupts = self._num_interrupts
        async with self._ordered:
            for start in range(0, len(data), self._piece_bytes):
                piece = data[start : start + self._piece_bytes]
                num_samples = len(piece) // self._sample_bytes
                await self._changed.until(
                    lambda n=num_samples: (  # type: ignore[misc]
                        self._lead.has_room(n) or self._num_interrupts > num_interrupts or self.has_ended
                    )
                )
                if self._num_interrupts > num_interrupts:
                    return
                self._lead.sent(num_samples)
                await self._send(pb.StreamAvatarRequest(audio=pb.AudioPiece(data=piece)))

    async def end_turn(self) -> None:
        """End the turn: what was pushed is spoken to its end without waiting for more. What follows is another turn."""
        async with self._ordered:
            self._lead.turn_ended()
            await self._send(pb.StreamAvatarRequest(end_turn=pb.EndTurn()))

    async def interrupt(self) -> Interrupted:
        """Fall silent: sound that is not yet drawn and frames that are not yet sent are dropped.

        Sound that is pushed meanwhile waits for the answer, and is spoken after it.
        """
        self._num_interrupts += 1
        self._changed.now()
        async with self._ordered:
            self._is_interrupting, self._interrupted = True, None
            try:
                await self._send(pb.StreamAvatarRequest(interrupt=pb.InterruptAvatar()))
                await self._changed.until(lambda: self._interrupted or self.has_ended)
                if not self._interrupted:
                    raise self._failure or ProtocolOrder("the stream ended before the interrupt was answered")
                return self._interrupted
            finally:
                self._is_interrupting = False

    async def close(self) -> None:
        """Say that no more sound comes. The rest of the frames comes, then the iteration ends."""
        async with self._ordered:
            if not self._is_closing:
                await self._send(pb.StreamAvatarRequest(close=pb.CloseAvatar()))
                self._is_closing = True

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Item:
        self._is_iterated = True
        await self._changed.until(lambda: self._items or self.has_ended)
        if self._items:
            self._changed.now()
            return self._items.popleft()
        if self._failure:
            raise self._failure
        raise StopAsyncIteration

    async def frames(self) -> AsyncGenerator[Frame, None]:
        """The frames, without what comes between them."""
        async for item in self:
            if isinstance(item, Frame):
                yield item

    async def run(self, sound: Sound | None = None) -> None:
        """Take what comes, and push `sound` if there is any, until the stream has ended. The stream must be open."""
        async with background(self._feed(sound)) if sound is not None else nullcontext():
            try:
                while True:
                    async with background(self._write_all()):
                        broken = await self._read_all()
                    if self.has_ended:
                        break
                    await self._reopen(broken)
            except AvatarError as error:
                self._end(error)
            self._changed.now()

    async def open(self, *, is_resume: bool = False) -> pb.AvatarOpened:
        """Open a call. Raises what the gateway says, ConnectionLost if there is none."""
        self._call = self._stub.StreamAvatar(metadata=self._metadata)
        self._status = CallStatus(self._call)
        opening = pb.OpenAvatar()
        opening.CopyFrom(self._opening)
        if is_resume:
            opening.resume.next_frame = self._next_frame
        try:
            async with asyncio.timeout(OPEN_S):
                await self._call.write(pb.StreamAvatarRequest(open=opening))
                response = await self._call.read()
        except TimeoutError as error:
            self._call.cancel()
            raise ConnectionLost(f"the gateway did not open a stream in {OPEN_S:g} s") from error
        except (grpc.aio.AioRpcError, asyncio.CancelledError, asyncio.InvalidStateError) as error:
            raise self._ended_by(error) from error
        if not isinstance(response, pb.StreamAvatarResponse):
            raise ConnectionLost(ENDED_EARLY)
        opened = response.opened
        if not is_resume:
            self._next_frame = opened.session.next_frame
            self.init_segment = opened.init_segment
        return opened

    async def _read_all(self) -> ConnectionLost:
        """Read until the call ends; how it did. Raises what the gateway says, if it is that."""
        try:
            while isinstance(response := await self._call.read(), pb.StreamAvatarResponse):
                self._take(response)
                self._changed.now()
                await self._changed.until(
                    lambda: len(self._items) < MAX_WAITING or not self._is_iterated or self._is_interrupting
                )
        except (grpc.aio.AioRpcError, asyncio.CancelledError) as problem:
            error = self._ended_by(problem)
            if not isinstance(error, ConnectionLost):
                raise error from problem
            return error
        return ConnectionLost(ENDED_EARLY)

    def _ended_by(self, problem: BaseException) -> AvatarError:
        """The error that ended the call. Raises CancelledError if it was not the peer who cancelled."""
        task = asyncio.current_task()
        if isinstance(problem, asyncio.CancelledError) and task and task.cancelling():
            raise problem
        own = problem if isinstance(problem, grpc.aio.AioRpcError) else None
        ended = self._status.instead_of(own) if own else self._status.ended
        return error_of(ended) if ended else ConnectionLost(ENDED_EARLY)

    def _take(self, response: pb.StreamAvatarResponse) -> None:
        """Note what a message says, and keep its items unless they have come before."""
        match response.WhichOneof("part"):
            case "closed":
                self.closed = response.closed
            case "interrupted":
                self._lead.dropped()
                if self._is_interrupting:
                    self._sent.forget()
                self._interrupted = interrupted_of(response.interrupted)
        self._items.extend(item for item in items_of(response) if self._is_new(item))

    def _is_new(self, item: Item) -> bool:
        """Whether an item has not come before the connection broke."""
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
        self._lead.came(item)
        return True

    async def _write_all(self) -> None:
        """Write what is to be sent, until the call ends; reading tells how."""
        while True:
            await self._changed.until(self._sent.has_next)
            try:
                request = self._sent.take()
                self._changed.now()
                await self._call.write(request)
            except (grpc.aio.AioRpcError, asyncio.CancelledError, asyncio.InvalidStateError) as problem:
                self._ended_by(problem)
                return

    async def _reopen(self, broken: ConnectionLost) -> None:
        """Open another call where the broken one ended. Raises `broken` once the gateway waits no longer."""
        ends, wait_s = time.monotonic() + self._resume_s, RETRY_S
        while time.monotonic() < ends:
            try:
                opened = await self.open(is_resume=True)
            except (ConnectionLost, NoCapacity, SessionBusy, StoreUnavailable):  # the gateway has not noticed yet
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, MAX_RETRY_S)
            else:
                self._sent.rewind(opened.num_messages)
                return
        raise broken

    async def _send(self, request: pb.StreamAvatarRequest) -> None:
        """Have a request written. Raises how the stream ended if it has."""
        if self._is_closing and not self._failure:
            raise ProtocolOrder("the stream was closed: nothing can be sent on it")
        kept = self._sent.add(request)
        self._changed.now()
        await self._changed.until(lambda: kept.is_taken or self.has_ended)
        if self._failure:
            raise self._failure

    async def _feed(self, sound: Sound) -> None:
        """Push all of a sound and close. What its source raises ends the stream."""
        try:
            async for piece in pieces(sound):
                await self.push(piece)
            await self.close()
        except AvatarError:
            pass  # the stream has ended; who iterates is told
        except Exception as error:
            self._end(error)
            self._call.cancel()

    def _end(self, failure: Exception) -> None:
        self._failure = self._failure or failure
        self._changed.now()


class Changed:
    """Something may have changed: who waits for a state looks again."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def now(self) -> None:
        """Have all who wait look."""
        self._event.set()
        self._event = asyncio.Event()

    async def until(self, state: Callable[[], object]) -> None:
        """Wait for a state."""
        while not state():
            await self._event.wait()


async def pieces(sound: Sound) -> AsyncGenerator[bytes, None]:
    """The pieces of a sound."""
    if isinstance(sound, AsyncIterable):
        async for piece in sound:
            yield piece
    else:
        for piece in [sound] if isinstance(sound, bytes) else sound:
            yield piece
