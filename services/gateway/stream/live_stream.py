"""One session's pipeline: a client's sound in at one end, frames out at the other.

    Sound -> audio -> admitted -> denoiser 0 .. N-1 -> finished -> vae -> Outbox

Blocks are admitted in order and numbered here, and always run through to the end. An interrupt drops what is not yet
admitted, and the frames of what is; it never reaches into the pipeline, whose states have no way back.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing

from avatar import telemetry
from avatar.errors import InvalidAudio, MessageTooLarge, ProtocolOrder
from avatar.failover.stage import FailoverStage
from avatar.rpc.client import Relayable
from avatar.rpc.wire import RelayedBlock
from avatar.settings import GatewaySettings
from avatar.v1 import avatar_service_pb2 as api
from avatar.v1 import types_pb2 as api_types
from avatar.worker.v1 import audio_pb2, types_pb2
from services.gateway.options import Choices
from services.gateway.stages import SessionStages
from services.gateway.stream.acks import Heard
from services.gateway.stream.conditions import Versions
from services.gateway.stream.outbox import Item, Outbox
from services.gateway.stream.speech import BlockSound, Sound, Turn
from services.gateway.stream.timeline import TOLERANCE_S, Grid, Playout

# A session's first frames are the decoder's start, and not shown.
FIRST_FRAME = 3
# Each frame of these can be decoded alone.
ALWAYS_KEY = ("rgb24", "jpeg")
LATE_BLOCKS = 3


class Conversation:
    """The pipeline of one session.

    position: where the session is; kept up to date. advanced: set when it has changed.
    attached: set while a client is connected; nothing is admitted without one.
    """

    def __init__(
        self,
        streams: SessionStages,
        choices: Choices,
        session: types_pb2.Session,
        position: types_pb2.Position,
        conditions: types_pb2.Conditions,
        settings: GatewaySettings,
    ) -> None:
        self.position = position
        self.num_blocks = 0
        self.advanced, self.attached = asyncio.Event(), asyncio.Event()
        self.versions = Versions(position, conditions, streams.sink_update_block)
        self.heard = Heard(position)
        self._streams = streams
        self._choices = choices
        self._settings = settings
        self._grid = Grid(choices.rate_hz, session.frame_rate_hz, session.block_frames)
        self._sample_bytes = choices.sample_bytes
        shown = position.num_turn_samples
        turn = Turn(position.turn, num_samples=shown, num_drawn=shown, is_started=shown > 0)
        self.sound = Sound(self._grid, self._sample_bytes, time.monotonic, turn, position.num_samples)
        self.playout = Playout(self._grid, streams.block_latency_s)
        kept_frames = round(settings.kept_s * session.frame_rate_hz)
        is_fragmented = choices.video == "fmp4"
        self.outbox = Outbox(self._grid, position, kept_frames, settings.kept_bytes, is_fragmented=is_fragmented)
        # One for each stage behind admission keeps each busy, and one waits at the door; up to two are on their way
        # between stages, which is a step's time where steps are as short as 20 ms.
        self._most_inside = len(streams.remaining_s) + 2
        self._slots = asyncio.Semaphore(self._most_inside)
        self._room = asyncio.Event()
        self._inside: deque[BlockSound] = deque()
        # Blocks that are the first of a rebuilt stream, and whose frames did not come yet.
        self._jumps: set[int] = {position.next_block} if position.opened else set()
        self._statistics: deque[bytes] = deque()
        self._gathered: list[api_types.VideoFrame] = []
        self._first_sound_s: float | None = None
        self._num_late = 0
        self._is_jump = False
        self._last_jump: int | None = None
        self._is_reader_slow = False

    def attach(self) -> None:
        """A client is connected."""
        if self._choices.is_live:
            self.playout.restart(self.outbox.next_frame)
        self.attached.set()

    async def hear(self, request: api.StreamAvatarRequest) -> bool:
        """Take a message of the client; whether it was the last. Offline, waits until there is room for its sound."""
        match request.WhichOneof("part"):
            case "audio":
                self.heard.took(await self._take(request.audio.data))
            case "end_turn":
                turn = self.sound.end_turn()
                self.heard.took(0, turn.number)
                self._end(turn)
            case "interrupt":
                interrupted = self.interrupt()
                self.heard.took(0)
                told = api.AvatarInterrupted(position_us=interrupted.position_us, was_speaking=interrupted.was_speaking)
                self.outbox.put(Item([api.StreamAvatarResponse(interrupted=told)]))
            case "close":
                if not self.sound.num_samples and not self._choices.is_live:
                    raise InvalidAudio.at("audio.data", "the stream was closed before any sound came")
                turn = self.sound.close()
                self.heard.took(0, turn.number)
                if turn.num_samples:
                    self._end(turn)
                return True
            case part:
                raise ProtocolOrder(f"{part or 'an empty message'} came on an open stream")
        return False

    def interrupt(self) -> api.InterruptResponse:
        """Drop speech that is not yet admitted and frames that are not yet sent; what was shown of it."""
        blocks = [block for block in self._inside if block.turn and not block.is_dropped]
        if not (self.sound.is_speaking or blocks or self.outbox.has_speech):
            return api.InterruptResponse(next_frame=self.outbox.next_frame)
        self._gathered.clear()
        for block in self._inside:
            block.is_dropped = True
        for turn in self.sound.interrupt():
            self._finish(turn, interrupted=True)
        shown_us = self._grid.duration_us(self.outbox.drop())
        self.outbox.num_shown = self.sound.num_samples
        self.playout.restart(self.outbox.next_frame)
        self._room.set()
        return api.InterruptResponse(next_frame=self.outbox.next_frame, position_us=shown_us, was_speaking=True)

    def tell(self, kind: api.Notice.Kind.ValueType, message: str, within_s: float = 0.0, num_samples: int = 0) -> None:
        """Have the client told something."""
        notice = api.Notice(kind=kind, message=message, within_s=within_s, num_samples=num_samples)
        self.outbox.put(Item([api.StreamAvatarResponse(event=api.AvatarEvent(notice=notice))]))

    async def run(self) -> None:
        """Make frames until the client has closed and all are on their way out."""
        streams = self._streams
        for stage in streams.all[1:]:
            stage.on_rebuilt = self._jumps.add
        blocks = self._admitted(streams.audio(self._live() if self._choices.is_live else self.sound.offline()))
        behind = streams.remaining_s[-1 - len(streams.denoisers) : -1]
        for denoiser, remaining_s in zip(streams.denoisers, behind, strict=True):
            blocks = self._denoised(denoiser, remaining_s, blocks)
        async with aclosing(streams.vae(self._finished(blocks))) as frames:
            async for frame in frames:
                await self._made(frame)

    def note(self) -> types_pb2.Position:
        """The position, as it is now."""
        self.outbox.note(self.position)
        self.heard.note(self.position, self.outbox.num_shown)
        self.versions.note(self.position)
        return self.position

    def usage(self) -> list[api_types.StageUsage]:
        """What each stage did, once all has been answered."""
        return [
            api_types.StageUsage(stage=each.stage, num_blocks=each.closed.num_blocks, busy_s=each.closed.busy_s)
            for each in self._streams.all
        ]

    async def _take(self, data: bytes) -> int:
        """Take sound; how many samples of it count as taken."""
        if len(data) > self._settings.max_audio_bytes:
            raise MessageTooLarge(f"{len(data)} bytes of sound at once, the limit is {self._settings.max_audio_bytes}")
        if len(data) % self._sample_bytes:
            raise InvalidAudio.at("audio.data", f"{len(data)} bytes are no multiple of {self._sample_bytes}")
        self._first_sound_s = self._first_sound_s or time.monotonic()
        most, num_samples = self._settings.live_ahead_s * self._grid.rate_hz, len(data) // self._sample_bytes
        if not self._choices.is_live:
            await self._until_room()
        elif self.sound.pending_samples + num_samples > most:
            ahead = f"{self._settings.live_ahead_s:g} s of sound are waiting"
            self.tell(api.Notice.KIND_AUDIO_REFUSED, ahead, num_samples=num_samples)
            return 0
        skip = min(self.heard.skip, num_samples)
        self.heard.skip -= skip
        self.sound.take(data[skip * self._sample_bytes :])
        return num_samples

    async def _until_room(self) -> None:
        """Wait until less sound than the settings allow is ahead of the blocks that are admitted."""
        most = self._settings.audio_ahead_s * self._grid.rate_hz
        while self.sound.ahead_samples >= most:
            self._room.clear()
            await self._room.wait()

    def _end(self, turn: Turn) -> None:
        """The turn has all of its sound: it ends with its last frame, which may be out already."""
        if turn.num_drawn == turn.num_samples:
            self._finish(turn, interrupted=False)

    def _finish(self, turn: Turn, *, interrupted: bool) -> None:
        if turn in self.sound.unfinished:
            self.sound.unfinished.remove(turn)
        finished = api.PlaybackFinished(turn=turn.number, interrupted=interrupted)
        message = api.StreamAvatarResponse(event=api.AvatarEvent(playback_finished=finished))
        self.outbox.put(Item([message], turn=turn.number, num_samples=turn.num_samples))

    def _live(self) -> AsyncGenerator[audio_pb2.AudioPiece, None]:
        async def until_free() -> None:
            await self._slots.acquire()
            await self.attached.wait()

        behind_samples = -(-self._streams.lookahead_ns * self._grid.rate_hz // 1_000_000_000)
        self.playout.restart(self.position.next_frame)
        pieces = self.sound.live(
            self.playout, self._planned_frame, behind_samples, self._settings.patience_s, until_free
        )
        return self._hurried(pieces)

    async def _hurried(
        self, pieces: AsyncGenerator[audio_pb2.AudioPiece, None]
    ) -> AsyncGenerator[audio_pb2.AudioPiece, None]:
        """Pieces of a block each, which say how soon the block is needed."""
        async with aclosing(pieces):
            async for piece in pieces:
                due_s = self.sound.begun[-1].due_s
                assert due_s is not None
                piece.slack_s = due_s - self._streams.remaining_s[0] - time.monotonic()
                yield piece

    def _planned_frame(self) -> int:
        """Number of the first frame of the block that is begun next."""
        made = self.outbox.next_frame + self.outbox.num_waiting_frames
        ahead = sum(block.num_left for block in (*self._inside, *self.sound.begun) if not block.is_dropped)
        if ahead:
            # Where blocks take longer than they last, no more are begun than are shown.
            self.playout.overdue(made)
        return made + ahead

    async def _admitted(self, encoded: AsyncGenerator[types_pb2.Block, None]) -> AsyncGenerator[RelayedBlock, None]:
        """The blocks that are denoised, numbered, as many at a time as keep every stage busy."""
        async with aclosing(encoded):
            is_jump = False

            def jumped(_: int) -> None:
                nonlocal is_jump
                is_jump = True

            self._streams.audio.on_rebuilt = jumped
            async for block in encoded:
                if not self._choices.is_live:
                    await self._slots.acquire()
                    await self.attached.wait()
                sound = self.sound.begun.popleft()
                self._room.set()
                if sound.is_dropped:
                    self._slots.release()
                    continue
                self._inside.append(sound)
                self._statistics.append(block.statistics)
                block.ClearField("statistics")
                await self.versions.admit(block)
                sound.number = block.index
                if block.index == 0:
                    sound.num_left -= FIRST_FRAME
                if is_jump:
                    is_jump = False
                    self._jumps.add(block.index)
                yield RelayedBlock.of(block)

    async def _finished(self, blocks: AsyncGenerator[RelayedBlock, None]) -> AsyncGenerator[RelayedBlock, None]:
        """Denoised blocks for the decoder; once block 0 is here, the last level has written the new sink."""
        async with aclosing(blocks):
            async for block in blocks:
                self.versions.finished(block.index)
                head = types_pb2.Block(index=block.index, traceparent=block.head.traceparent)
                self._hurry(head, self._streams.remaining_s[-1])
                yield RelayedBlock(head, latent=block.latent)

    async def _denoised(
        self,
        denoiser: FailoverStage[Relayable, types_pb2.Block],
        remaining_s: float,
        blocks: AsyncGenerator[RelayedBlock, None],
    ) -> AsyncGenerator[RelayedBlock, None]:
        """A level's answers, with what it was given put back: it answers with the latent alone."""
        given: dict[int, RelayedBlock] = {}

        async def kept() -> AsyncGenerator[RelayedBlock, None]:
            async with aclosing(blocks):
                async for block in blocks:
                    self._hurry(block.head, remaining_s)
                    given[block.index] = block
                    yield block

        async with aclosing(denoiser(kept())) as answers:
            async for answer in answers:
                if answer.HasField("carried"):
                    self.versions.keep(answer.carried)
                yield given.pop(answer.index).with_latent(answer.latent)

    def _hurry(self, block: types_pb2.Block, remaining_s: float) -> None:
        """Say how soon a block is needed of the next stage, behind which it takes so long."""
        due_s = next(each.due_s for each in self._inside if each.number == block.index)
        if due_s is not None:
            block.slack_s = due_s - remaining_s - time.monotonic()

    async def _made(self, frame: types_pb2.Frame) -> None:
        """Put a frame, or all of its block, on its way out; nothing of a block that was dropped."""
        block = self._inside[0]
        if jumps := {index for index in self._jumps if index <= frame.block}:
            self._jumps -= jumps
            # Stages that are lost at once, each with another block, are one jump.
            if self._last_jump is None or min(jumps) > self._last_jump + self._most_inside:
                self._is_jump, self._last_jump = True, min(jumps)
        if not block.is_dropped:
            if not block.is_shown:
                block.is_shown = True
                self._note_time(block)
            is_key = frame.is_key or self._choices.video in ALWAYS_KEY
            shown = api_types.VideoFrame(
                data=frame.data, is_idle=block.turn is None, is_key=is_key, num_frames=frame.num_frames or 1
            )
            self._gathered.append(shown)
            if frame.is_last or not self._choices.is_per_block:
                await self._put(block)
        if frame.is_last:
            self._inside.popleft()
            self._slots.release()
            self.num_blocks += 1
            self.position.next_block = frame.block + 1
            self.position.statistics = self._statistics.popleft()
            self.advanced.set()
            if block.turn and not block.is_dropped:
                block.turn.num_drawn += block.num_samples
                if block.turn.is_ended:
                    self._end(block.turn)

    async def _put(self, block: BlockSound) -> None:
        """Put the frames that are gathered on their way out, with their sound, once there is room."""
        is_slow = self.outbox.is_full and self.attached.is_set()
        if is_slow and self._choices.is_live and not self._is_reader_slow:
            limit_s = self._settings.max_unread_s
            self.tell(api.Notice.KIND_SLOW_READER, "frames are not read as fast as they are made", limit_s)
        self._is_reader_slow = is_slow
        await self.outbox.until_room()
        frames, self._gathered = self._gathered, []
        if block.is_dropped:
            return
        if self._is_jump:
            frames[0].is_discontinuity = True
            self._is_jump = False
        num_frames = sum(frame.num_frames for frame in frames)
        start = self._grid.block_frames - block.num_left
        block.num_left -= num_frames
        messages = [api.StreamAvatarResponse(frame=frame) for frame in frames]
        if self._choices.is_per_block:
            messages = [api.StreamAvatarResponse(chunk=api_types.VideoChunk(frames=frames))]
        end_sample = self._sample(block, start + num_frames)
        if self._choices.returns_audio:
            data = block.data[self._sample(block, start) * self._sample_bytes : end_sample * self._sample_bytes]
            messages.insert(0, api.StreamAvatarResponse(audio=api_types.AvatarAudio(data=data)))
        item = Item(messages, num_frames)
        if (turn := block.turn) is not None:
            if not turn.is_started:
                turn.is_started = True
                event = api.AvatarEvent(playback_started=api.PlaybackStarted(turn=turn.number))
                self.outbox.put(Item([api.StreamAvatarResponse(event=event)], turn=turn.number))
            num_samples = min(block.num_samples, end_sample)
            item.turn, item.num_samples = turn.number, block.before + num_samples
            item.num_shown = block.first_sample + num_samples
        self.outbox.put(item)

    def _sample(self, block: BlockSound, frame: int) -> int:
        """Where a frame of a block begins in the block's sound."""
        first = block.index * self._grid.block_frames
        return self._grid.sample(first + frame) - self._grid.sample(first)

    def _note_time(self, block: BlockSound) -> None:
        """The first frame of a block is here."""
        if block.turn and self._first_sound_s:
            telemetry.TIME_TO_FIRST_FRAME.record(time.monotonic() - self._first_sound_s)
            self._first_sound_s = math.inf
        if not self._choices.is_live:
            return
        frame = self.outbox.next_frame + self.outbox.num_waiting_frames
        late_s = max(block.late_s, self.playout.came(frame, time.monotonic() - block.begun_s))
        self._num_late = self._num_late + 1 if late_s > TOLERANCE_S else 0
        if self._num_late == LATE_BLOCKS:
            self.tell(api.Notice.KIND_DEGRADED, "frames come later than they are shown")
