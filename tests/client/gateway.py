"""A gateway by script: live mode's rules without models, and a wire that can be cut.

It follows the contract as far as a client can tell: blocks at a fixed pace, idle ones when there is no sound, turns and
their events, interrupts, refusals, and resuming from a log of all that was sent. Frames hold their number.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import Message

from avatar.errors import ResumeImpossible, SessionBusy
from avatar.rpc.server import Context, opening, serving
from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import avatar_service_pb2_grpc as pb_grpc
from avatar.v1 import types_pb2 as types

FRAME_RATE_HZ, BLOCK_FRAMES, FIRST_BLOCK_FRAMES, FIRST_FRAME = 25, 12, 9, 3
FRAME_US = 1_000_000 // FRAME_RATE_HZ


@dataclass
class Turn:
    """Sound that waits to be spoken, and what was."""

    number: int
    waiting: bytes = b""
    num_shown: int = 0
    has_started: bool = False
    has_ended: bool = False


@dataclass
class Talk:
    """One session: it outlives its calls."""

    opening: pb.OpenAvatar
    tick_s: float
    max_ahead_s: float
    frame_bytes: int
    heard: bytearray = field(default_factory=bytearray)
    refused: int = 0
    num_messages: int = 0
    log: list[pb.StreamAvatarResponse] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=lambda: [Turn(0)])
    num_sent: int = 0
    next_frame: int = FIRST_FRAME
    num_events: int = 0
    num_blocks: int = 0
    is_closing: bool = False
    is_attached: bool = False
    grew: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def second_bytes(self) -> int:
        sample_bytes = 2 if self.opening.audio.encoding == types.SAMPLE_ENCODING_PCM16 else 4
        return sample_bytes * self.opening.audio.num_channels * self.opening.audio.rate_hz

    @property
    def sample_bytes(self) -> int:
        return self.second_bytes // self.opening.audio.rate_hz

    def say(self, **part: Any) -> None:
        self.log.append(pb.StreamAvatarResponse(**part))
        self.grew.set()

    def tell(self, **kind: Message) -> None:
        pts_us = self.next_frame * FRAME_US
        self.say(event=pb.AvatarEvent(number=self.num_events, pts_us=pts_us, **kind))  # type: ignore[arg-type]
        self.num_events += 1

    def take(self, request: pb.StreamAvatarRequest) -> None:
        self.num_messages += 1
        match request.WhichOneof("part"):
            case "audio":
                self.heard += request.audio.data
                ahead = sum(len(turn.waiting) for turn in self.turns) + len(request.audio.data)
                surplus = round(ahead - self.max_ahead_s * self.second_bytes)
                if surplus > 0:
                    self.refused += surplus // self.sample_bytes
                    refused = pb.Notice(kind=pb.Notice.KIND_AUDIO_REFUSED, num_samples=surplus // self.sample_bytes)
                    self.tell(notice=refused)
                self.turns[-1].waiting += request.audio.data
            case "end_turn":
                self.turns[-1].has_ended = True
                self.turns.append(Turn(self.turns[-1].number + 1))
            case "interrupt":
                self.say(interrupted=self.interrupt())
            case "close":
                self.is_closing = True

    def interrupt(self) -> pb.AvatarInterrupted:
        del self.log[self.num_sent :]  # what was not sent is dropped, and its numbers are used again
        shown = [each.frame.index for each in self.log if each.HasField("frame")]
        self.next_frame = max(shown) + 1 if shown else FIRST_FRAME
        turn = self.turns[0]
        was_speaking = turn.has_started or bool(turn.waiting)
        if was_speaking:
            self.finish(turn, is_interrupted=True)
            self.turns = [Turn(self.turns[-1].number + 1)]
        return pb.AvatarInterrupted(
            next_frame=self.next_frame, position_us=self.position_us(turn), was_speaking=was_speaking
        )

    def position_us(self, turn: Turn) -> int:
        return turn.num_shown * 1_000_000 // self.second_bytes

    def finish(self, turn: Turn, *, is_interrupted: bool) -> None:
        finished = pb.PlaybackFinished(
            turn=turn.number,
            position_us=self.position_us(turn),
            interrupted=is_interrupted,
            next_frame=self.next_frame,
        )
        self.tell(playback_finished=finished)

    def block(self) -> None:
        """Draw a block: of the first turn's speech, or idle."""
        turn = self.turns[0]
        num_frames = BLOCK_FRAMES if self.num_blocks else FIRST_BLOCK_FRAMES
        num_bytes = num_frames * self.second_bytes // FRAME_RATE_HZ
        spoken, turn.waiting = turn.waiting[:num_bytes], turn.waiting[num_bytes:]
        if spoken and not turn.has_started:
            turn.has_started = True
            self.tell(playback_started=pb.PlaybackStarted(turn=turn.number))
        if self.opening.return_audio:
            self.say(audio=types.AvatarAudio(pts_us=self.next_frame * FRAME_US, data=spoken.ljust(num_bytes, b"\0")))
        frames = [
            types.VideoFrame(
                index=index,
                pts_us=index * FRAME_US,
                data=(b"frame %d" % index).ljust(self.frame_bytes, b"."),
                is_idle=not spoken,
                is_key=index == self.next_frame,
                num_frames=1,
            )
            for index in range(self.next_frame, self.next_frame + num_frames)
        ]
        self.next_frame += num_frames
        self.num_blocks += 1
        turn.num_shown += len(spoken)
        if self.opening.output.per_block:
            self.say(chunk=types.VideoChunk(frames=frames))
        else:
            for frame in frames:
                self.say(frame=frame)
        if turn.has_ended and not turn.waiting:
            if turn.has_started:
                self.finish(turn, is_interrupted=False)
            self.turns.pop(0)

    def is_whole(self) -> bool:
        turn = self.turns[0]
        return turn.has_ended or self.is_closing or not 0 < len(turn.waiting) < self.second_bytes / 2

    async def run(self) -> None:
        while not (self.is_closing and not any(turn.waiting for turn in self.turns)):
            # A block that is part speech waits a little for the rest of it.
            for _ in range(5):
                if self.is_whole():
                    break
                await asyncio.sleep(self.tick_s)
            self.block()
            await asyncio.sleep(self.tick_s)
        if self.turns[0].has_started:
            self.finish(self.turns[0], is_interrupted=False)
        self.say(closed=pb.AvatarClosed(num_frames=self.next_frame - FIRST_FRAME, num_blocks=self.num_blocks))

    def seek(self, next_frame: int) -> None:
        """Send again from a frame on, with one more and the events before it."""
        frames = [[each.frame] if each.HasField("frame") else each.chunk.frames for each in self.log]
        self.num_sent = next(
            (at for at, them in enumerate(frames) if any(frame.index >= next_frame - 1 for frame in them)), len(frames)
        )
        while self.num_sent and not frames[self.num_sent - 1]:
            self.num_sent -= 1


class Gateway(pb_grpc.AvatarServiceServicer):
    """Serves talks by script.

    tick_s: from block to block; a block's frames last 0.48 s. num_calls: streams that were opened.
    num_busy: attempts to resume that are refused, as if the old call were not yet known to be lost.
    forgets: nothing can be resumed.
    """

    service_name = "avatar.v1.AvatarService"

    def __init__(
        self, *, tick_s: float = 0.03, max_live_ahead_s: float = 4.0, resume_s: float = 5.0, frame_bytes: int = 0
    ) -> None:
        self.tick_s = tick_s
        self.frame_bytes = frame_bytes
        self.limits = pb.GetCapabilitiesResponse(
            video=types.VideoFormat(width=64, height=64, frame_rate_hz=FRAME_RATE_HZ),
            block_frames=BLOCK_FRAMES,
            max_audio_bytes=1 << 20,
            max_live_ahead_s=max_live_ahead_s,
            resume_s=resume_s,
        )
        self.talks: dict[str, Talk] = {}
        self.deleted: set[str] = set()
        self.metadata: dict[str, str] = {}
        self.num_calls = 0
        self.num_busy = 0
        self.forgets = False
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def talk(self) -> Talk:
        return list(self.talks.values())[-1]

    def add_to(self, server: Any) -> None:
        pb_grpc.add_AvatarServiceServicer_to_server(self, server)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        for ended in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended

    async def GetCapabilities(self, request: Any, context: Context) -> pb.GetCapabilitiesResponse:  # noqa: ARG002, N802
        self.metadata = {str(key): str(value) for key, value in context.invocation_metadata() or ()}
        return self.limits

    async def CreateReference(self, request: Any, context: Context) -> pb.CreateReferenceResponse:  # noqa: ARG002, N802
        return pb.CreateReferenceResponse(reference=types.Reference(id="0" * 64, notice="not a face"))

    async def GetReference(self, request: Any, context: Context) -> pb.GetReferenceResponse:  # noqa: N802
        raise NotImplementedError

    async def DeleteReference(self, request: Any, context: Context) -> pb.DeleteReferenceResponse:  # noqa: N802
        raise NotImplementedError

    async def CreateSession(self, request: Any, context: Context) -> pb.CreateSessionResponse:  # noqa: ARG002, N802
        return pb.CreateSessionResponse(session=self.session(f"session-{len(self.talks)}"))

    async def GetSession(self, request: Any, context: Context) -> pb.GetSessionResponse:  # noqa: ARG002, N802
        return pb.GetSessionResponse(session=self.session(request.session_id))

    async def UpdateSession(self, request: Any, context: Context) -> pb.UpdateSessionResponse:  # noqa: ARG002, N802
        return pb.UpdateSessionResponse(session=request.session, first_block=7)

    async def DeleteSession(self, request: Any, context: Context) -> pb.DeleteSessionResponse:  # noqa: ARG002, N802
        self.deleted.add(request.session_id)
        return pb.DeleteSessionResponse()

    async def Interrupt(self, request: Any, context: Context) -> pb.InterruptResponse:  # noqa: ARG002, N802
        told = self.talks[request.session_id].interrupt()
        return pb.InterruptResponse(
            next_frame=told.next_frame, position_us=told.position_us, was_speaking=told.was_speaking
        )

    def session(self, name: str) -> types.Session:
        return types.Session(id=name, video=self.limits.video, next_frame=FIRST_FRAME)

    async def StreamAvatar(self, requests: AsyncIterator[Any], context: Context) -> None:  # type: ignore[override]  # noqa: N802
        opened: pb.OpenAvatar = await opening(requests)
        self.num_calls += 1
        talk = self.talks.get(opened.session_id)
        if not opened.HasField("resume"):
            talk = self.talks[opened.session_id] = Talk(
                opened, self.tick_s, self.limits.max_live_ahead_s, self.frame_bytes
            )
            task = asyncio.get_running_loop().create_task(talk.run())
            self._tasks.add(task)
        elif talk is None or self.forgets:
            raise ResumeImpossible("those frames are no longer kept")
        elif talk.is_attached or self.num_busy:
            self.num_busy = max(0, self.num_busy - 1)
            raise SessionBusy("another stream is open")
        else:
            talk.seek(opened.resume.next_frame)
        told = pb.AvatarOpened(
            session=self.session(opened.session_id),
            init_segment=b"init",
            num_samples=len(talk.heard) // talk.sample_bytes,
            num_messages=talk.num_messages,
        )
        await context.write(pb.StreamAvatarResponse(opened=told))
        talk.is_attached = True
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._hear(talk, requests))
                await self._show(talk, context)
        finally:
            talk.is_attached = False

    async def _hear(self, talk: Talk, requests: AsyncIterator[Any]) -> None:
        async for request in requests:
            talk.take(request)
            if talk.is_closing:
                return

    async def _show(self, talk: Talk, context: Context) -> None:
        while True:
            while talk.num_sent < len(talk.log):
                talk.num_sent += 1
                response = talk.log[talk.num_sent - 1]
                await context.write(response)
                if response.HasField("closed"):
                    return
            talk.grew.clear()
            await talk.grew.wait()


class Wire:
    """A TCP connection in between that can be cut, for a moment or for good."""

    def __init__(self, target: str) -> None:
        self.host, _, port = target.partition(":")
        self.port = int(port)
        self.is_down = False
        self.num_cuts = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._joining: set[asyncio.Task[None]] = set()

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self.join(reader, writer))
        self._joining.add(task)
        task.add_done_callback(self._joining.discard)

    async def close(self) -> None:
        self.cut(for_good=True)
        while self._joining:
            await asyncio.wait(self._joining)

    def cut(self, *, for_good: bool = False) -> None:
        """End every connection without a word."""
        self.is_down = self.is_down or for_good
        self.num_cuts += 1
        for writer in self._writers:
            writer.transport.abort()

    async def join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_down:
            writer.transport.abort()
            return
        there_reader, there_writer = await asyncio.open_connection(self.host, self.port)
        ends = {writer, there_writer}
        self._writers |= ends
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(pump(reader, there_writer))
                tasks.create_task(pump(there_reader, writer))
        finally:
            self._writers -= ends
            for end in ends:
                end.transport.abort()


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.transport.abort()


@asynccontextmanager
async def wired(target: str) -> AsyncGenerator[tuple[str, Wire], None]:
    """HOST:PORT of a wire to a gateway, and the wire."""
    wire = Wire(target)
    server = await asyncio.start_server(wire.accept, "127.0.0.1", 0)
    async with server:
        try:
            yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", wire
        finally:
            await wire.close()


@asynccontextmanager
async def scripted(gateway: Gateway) -> AsyncGenerator[str, None]:
    """HOST:PORT of a gateway by script."""
    async with serving("127.0.0.1:0", gateway) as port:
        try:
            yield f"127.0.0.1:{port}"
        finally:
            await gateway.stop()
