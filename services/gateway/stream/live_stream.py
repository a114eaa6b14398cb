"""One session's pipeline: a client's speech in at one end, frames out at the other.

    SpeechQueue -> audio -> admit -> denoiser 0 .. N-1 -> VAE -> Framer -> Outbox

Blocks are numbered here when they are admitted, and then always run through to the end. An interrupt drops speech that
is not admitted, and the frames of blocks that are; it never reaches into the pipeline, whose states cannot go back.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

from avatar import telemetry
from avatar.errors import InvalidAudio, ProtocolOrder, VoiceUnsupported
from avatar.failover.pool import WorkerPool
from avatar.failover.stage import FailoverStage
from avatar.rpc.client import Relayable
from avatar.rpc.wire import RelayedBlock
from avatar.settings import GatewaySettings
from avatar.v1 import avatar_service_pb2 as api
from avatar.v1 import types_pb2 as api_types
from avatar.worker.v1 import types_pb2
from services.gateway.options import StreamOptions
from services.gateway.stages import SessionStages
from services.gateway.stream.acks import Acks
from services.gateway.stream.conditions import ConditionVersions
from services.gateway.stream.framing import Framer, playback_finished
from services.gateway.stream.in_flight import FIRST_FRAME, BlocksInFlight, StartedBlock, Turn
from services.gateway.stream.incoming.heard_queue import HeardQueue
from services.gateway.stream.incoming.intake import Intake
from services.gateway.stream.incoming.turn_speaker import TurnSpeaker
from services.gateway.stream.outbox import Item, Outbox, notice
from services.gateway.stream.speech import LivePacing, SpeechQueue
from services.gateway.stream.timeline import MediaGrid, Timeline

# The client is told that its stream is degraded after so many late blocks in a row.
LATE_BLOCKS = 3
# A live stream may wait so many times longer than an offline one for a message of its client.
LIVE_SILENT_FACTOR = 60
# Blocks that may wait to be admitted before no more messages are read from the client: a few bytes can start a block.
MAX_STARTED_BLOCKS = 16
# Pieces of audio are acknowledged together up to this many seconds, so that tiny ones need no memory each.
ACK_S = 0.02
# Acknowledgements are settled once more than this many wait: blocks, which settle them otherwise, may take a while.
MAX_PENDING_ACKS = 500
# The position is written after so many seconds of speech: a client that resumes elsewhere gets as much again.
RECORD_S = 0.48


class LiveStream:
    """The pipeline of one session.

    position: the session's record; `record_position` updates it. advanced: set when it is to be written.
    speaker: speaks text; None if the deployment has no voice. max_silent_s: limit on `silent_s`; 0 if there is none.
    """

    def __init__(
        self,
        stages: SessionStages,
        options: StreamOptions,
        session: types_pb2.Session,
        position: types_pb2.Position,
        conditions: types_pb2.Conditions,
        settings: GatewaySettings,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """position, conditions: where the session starts or resumes, and the conditions of its next block.

        now: clock, in seconds.
        """
        self.position = position
        self.advanced = asyncio.Event()
        self.acks = Acks(position, round(ACK_S * options.rate_hz))
        self._stages, self._options, self._now = stages, options, now
        self._grid = MediaGrid(options.rate_hz, session.frame_rate_hz, session.block_frames)
        self.max_silent_s = settings.silent_s * (LIVE_SILENT_FACTOR if options.is_live else 1)
        self._timeline = Timeline(self._grid, stages.block_latency_s, now)
        self.outbox = Outbox(
            self._grid,
            position,
            kept_frames=round(settings.kept_s * session.frame_rate_hz),
            kept_bytes=settings.kept_bytes,
            max_unread_s=settings.max_unread_s,
            is_fragmented=options.video == "fmp4",
        )
        self._in_flight = BlocksInFlight(num_stages=len(stages.remaining_s) - 1)
        self.versions = ConditionVersions(position, conditions, stages.sink_update_block, self._in_flight.num_slots)
        delivered = position.num_turn_samples
        turn = Turn(position.turn, num_samples=delivered, num_finished=delivered, is_started=delivered > 0)
        lookahead_samples = -(-stages.lookahead_ns * options.rate_hz // 1_000_000_000)
        pacing = LivePacing(lookahead_samples, settings.patience_s, stages.remaining_s[0])
        heard = HeardQueue(options, self._grid, settings.live_ahead_s)
        self._speech = SpeechQueue(
            self._grid, options.sample_bytes, self._in_flight, pacing, turn, position.num_samples, now, heard.take
        )
        self.speaker: TurnSpeaker | None = None
        self._framer = Framer(options)
        self._intake = Intake(options, settings, self._speech, heard, self.acks, self.outbox, now)
        # The running statistics of the audio stage as of each admitted block.
        self._statistics: deque[bytes] = deque()
        # When the session's first frame was put into the outbox, here or at another gateway.
        self._first_frame_s = -math.inf if position.next_frame > FIRST_FRAME else math.inf
        # Blocks before which a stage's stream was rebuilt, and whose frames have not come yet.
        is_rebuilt = position.opened and position.next_frame > FIRST_FRAME
        self._rebuilt: set[int] = {position.next_block} if is_rebuilt else set()
        self._last_rebuilt: int | None = None
        self._is_discontinuity = self._has_first_frame = False

    def take_text(self, pool: WorkerPool[Any], use_audio: Callable[[float], Awaitable[None]]) -> None:
        """Accept text, which workers of a pool speak. use_audio: counts the seconds of its audio."""

        def finish_text(turn: Turn) -> None:
            self._speech.finish_text(turn)
            self.acks.finish_text(turn.number)
            self._finish_turns()

        add_audio = partial(self._intake.add_spoken, use_audio)
        self.speaker = TurnSpeaker(pool, self._options, self._speech, self.outbox, add_audio, finish_text)

    @property
    def is_connected(self) -> bool:
        return self._in_flight.connected.is_set()

    def connect(self) -> None:
        """Give blocks slots: a client is connected."""
        self._intake.heard_s = self._now()
        if self._options.is_live:
            self._timeline.restart(self.outbox.next_frame)
        self._in_flight.connected.set()

    def disconnect(self) -> None:
        """Give no slots until a client is connected."""
        self._in_flight.connected.clear()

    async def wait_connected(self) -> None:
        await self._in_flight.connected.wait()

    async def receive(self, request: api.StreamAvatarRequest) -> bool:
        """Take a message of the client and return whether it was the last. Offline, wait until its audio has room."""
        if self._options.is_live or request.audio.data or request.say.text:
            self._intake.heard_s = self._now()
        match request.WhichOneof("part"):
            case "audio" as kind:
                self.acks.received(kind, await self._intake.add(request.audio.data))
            case "say" as kind:
                if self.speaker is None:
                    raise VoiceUnsupported("this deployment has no voice; send audio")
                is_open, turn = self.speaker.add(request.say), self._speech.turn
                self.acks.received(kind, turn=turn.number if is_open else None, is_open=is_open)
            case "listen" as kind:
                self._intake.add_heard(request.listen.data, is_offered=self._stages.listens)
                self.acks.received(kind)
            case "end_turn" as kind:
                turn = self._speech.end_turn()
                self.acks.received(kind, turn=turn.number)
                self._turn_ended()
            case "interrupt" as kind:
                response = self.interrupt()
                self.acks.received(kind)
                interrupted = api.AvatarInterrupted(
                    position_us=response.position_us, was_speaking=response.was_speaking, spoken=response.spoken
                )
                self.outbox.put(Item([api.StreamAvatarResponse(interrupted=interrupted)]))
            case "close" as kind:
                if not (self._speech.num_samples or self._speech.has_speech or self._options.is_live):
                    raise InvalidAudio.at("audio.data", "the stream was closed before any audio came")
                turn = self._speech.close()
                self.acks.received(kind, turn=turn.number)
                self._turn_ended()
                return True
            case part:
                raise ProtocolOrder(f"{part or 'an empty message'} came on an open stream")
        if self.acks.num_pending > MAX_PENDING_ACKS:
            self.record_position()
        return False

    def _turn_ended(self) -> None:
        if self.speaker:
            self.speaker.end_turn()
        self._finish_turns()

    async def wait_for_few_items(self) -> None:
        """Wait until another message may be taken: started blocks, unfinished turns and waiting events are bounded."""
        while len(self._in_flight.started) > MAX_STARTED_BLOCKS:
            self._intake.has_room.clear()
            await self._intake.has_room.wait()
        await self.outbox.wait_for_few_items(lambda: len(self._speech.unfinished))

    def silent_s(self) -> float:
        """Return how long the client has sent nothing, in seconds; offline, and has been owed no frames.

        0 if it is not connected, or has sent all that it will.
        """
        is_waited_for = self.is_connected and not self._speech.is_closed
        if not is_waited_for or (not self._options.is_live and self._owes_frames()):
            self._intake.heard_s = self._now()
        last_frame_s = -math.inf if self._options.is_live else self.outbox.last_frame_s
        return self._now() - max(self._intake.heard_s, last_frame_s)

    def _owes_frames(self) -> bool:
        """Return whether frames will come although the client sends nothing more. Offline."""
        is_encoding = self._speech.waits_for_stage or self._stages.audio.is_answer_due
        return is_encoding or bool(self._in_flight.admitted) or self.outbox.has_frames

    def interrupt(self) -> api.InterruptResponse:
        """Drop speech that is not admitted and frames that are not sent; return how much of it was delivered."""
        if not (self._speech.has_speech or self._in_flight.has_speech or self.outbox.has_speech):
            return api.InterruptResponse(next_frame=self.outbox.next_frame)
        self._framer.drop()
        self._in_flight.drop()
        for turn in self._speech.interrupt():
            self.outbox.put(playback_finished(turn, interrupted=True))
        if self.speaker:
            self.speaker.interrupt()
        self.acks.interrupt()
        num_delivered, spoken = self.outbox.drop()
        self.outbox.num_delivered = self._speech.num_samples
        self._timeline.restart(self.outbox.next_frame)
        self._intake.has_room.set()
        return api.InterruptResponse(
            next_frame=self.outbox.next_frame,
            position_us=self._grid.duration_us(num_delivered),
            was_speaking=True,
            spoken=spoken,
        )

    async def run(self) -> None:
        """Make frames until the client has closed the stream and all of them are in the outbox."""
        for stage in self._stages.all[1:]:  # the audio stage's blocks have no index of the session: see `_admit`
            stage.on_rebuilt = partial(self._stage_rebuilt, stage)
        if self._options.is_live:
            if self._stages.notice:
                self.outbox.put(notice(api.Notice.KIND_TOO_SLOW, self._stages.notice))
            self._timeline.restart(self.position.next_frame)
            pieces = self._speech.live(self._timeline, self.outbox)
        else:
            pieces = self._speech.offline()
        blocks = self._admit(self._stages.audio(pieces))
        levels = self._stages.denoisers
        self._send_ahead(self.versions.known[0])
        self.versions.on_added = self._send_ahead
        for level, remaining_s in zip(levels, self._stages.remaining_s[-1 - len(levels) : -1], strict=True):
            blocks = self._denoise(level, remaining_s, blocks)
        async with aclosing(self._stages.vae(self._decode(blocks))) as frames:
            async for frame in frames:
                await self._deliver(frame)

    def record_position(self) -> types_pb2.Position:
        """Update the position and return it."""
        self.outbox.record(self.position)
        self.acks.record(self.position, self.outbox.num_delivered)
        self.versions.record(self.position)
        self.position.workers[:] = self._stages.workers
        return self.position

    def stage_usage(self) -> list[api_types.StageUsage]:
        """Return what each stage has done, once all blocks are finished."""
        return [
            api_types.StageUsage(stage=each.stage, num_blocks=each.closed.num_blocks, busy_s=each.closed.busy_s)
            for each in self._stages.all
        ]

    async def _admit(self, encoded: AsyncGenerator[RelayedBlock, None]) -> AsyncGenerator[RelayedBlock, None]:
        """Number the encoded blocks that are still wanted, as many at a time as there are slots."""
        is_rebuilt, audio = False, self._stages.audio

        def mark_rebuilt(_: int) -> None:
            nonlocal is_rebuilt
            is_rebuilt = audio.lost_at_s > self._first_frame_s

        audio.on_rebuilt = mark_rebuilt
        async with aclosing(encoded):
            async for block in encoded:
                if not self._options.is_live:
                    await self._in_flight.take_slot()
                speech = self._in_flight.admit()
                self._intake.has_room.set()
                if speech is None:
                    continue
                head = block.head
                self._statistics.append(head.statistics)
                head.ClearField("statistics")
                await self.versions.admit(head)
                self._in_flight.number(speech, head.index)
                if is_rebuilt:
                    is_rebuilt = False
                    self._rebuilt.add(head.index)
                yield RelayedBlock(head, block.inputs)

    def _send_ahead(self, conditions: types_pb2.Conditions) -> None:
        """Send conditions to all levels, which prefill them while no block needs their device."""
        for level in self._stages.denoisers:
            level.prefill(conditions)

    async def _denoise(
        self,
        level: FailoverStage[Relayable, RelayedBlock],
        remaining_s: float,
        blocks: AsyncGenerator[RelayedBlock, None],
    ) -> AsyncGenerator[RelayedBlock, None]:
        """Pass blocks through a level, which answers with the latent alone, and put their features back."""
        sent: dict[int, RelayedBlock] = {}

        async def send() -> AsyncGenerator[RelayedBlock, None]:
            async with aclosing(blocks):
                async for block in blocks:
                    self._set_deadline(block, remaining_s)
                    sent[block.index] = block
                    yield block

        async with aclosing(level(send())) as answers:
            async for answer in answers:
                if answer.head.HasField("carried"):
                    self.versions.add(answer.head.carried)
                yield sent.pop(answer.index).with_latent(answer.latent)

    async def _decode(self, blocks: AsyncGenerator[RelayedBlock, None]) -> AsyncGenerator[RelayedBlock, None]:
        """Pass denoised blocks to the VAE stage, which needs their latents alone.

        A block that gets here has passed the last level, which has written the sink's update by then, if there is one.
        """
        async with aclosing(blocks):
            async for block in blocks:
                self.versions.finish(block.index)
                head = types_pb2.Block(index=block.index, traceparent=block.head.traceparent)
                decoded = RelayedBlock(head, latent=block.latent)
                self._set_deadline(decoded, self._stages.remaining_s[-1])
                yield decoded

    def _set_deadline(self, block: RelayedBlock, remaining_s: float) -> None:
        """Set by when the next stage has to answer: the block's due time, less what it still takes after that stage."""
        due_s = self._in_flight.due_s[block.index]
        block.due_s = None if due_s is None else due_s - remaining_s

    async def _deliver(self, frame: types_pb2.Frame) -> None:
        """Put a frame, or all frames of its block, into the outbox; nothing of a block that was dropped."""
        block = self._in_flight.admitted[0]
        self._note_discontinuity(frame.block)
        is_message = frame.is_last or not self._options.is_per_block
        if is_message and not (block.has_frames or block.is_dropped):
            block.has_frames = True
            self._record_latency(block)
            await self.outbox.wait_for_space(warns=self._options.is_live and self.is_connected)
        if not block.is_dropped:
            for item in self._framer.add(frame, block, is_discontinuity=self._is_discontinuity):
                self._first_frame_s = min(self._first_frame_s, self._now())
                self.outbox.put(item)
                block.num_frames -= item.num_frames
                self._is_discontinuity = False
        if frame.is_last:
            self._finish_block(frame.block, block)

    def _finish_block(self, index: int, block: StartedBlock) -> None:
        """Finish a block whose frames are all in the outbox, or were dropped."""
        self._in_flight.finish(index)
        self.position.next_block = index + 1
        self.position.statistics = self._statistics.popleft()
        # Silence changes nothing that a resume depends on: the client names its next frame.
        is_needed = self.acks.num_pending or self.outbox.next_event > self.position.next_event
        if is_needed and index % max(1, round(RECORD_S / self._grid.block_s)) == 0:
            self.advanced.set()
        if block.turn and not block.is_dropped:
            block.turn.num_finished += block.num_samples
            self._finish_turns()

    def _finish_turns(self) -> None:
        """Finish turns in order, up to the first that has not ended or has frames still to come."""
        unfinished = self._speech.unfinished
        while unfinished and unfinished[0].is_over:
            self.outbox.put(*self._framer.finish_turn(unfinished.popleft()))

    def _stage_rebuilt(self, stage: FailoverStage[Any, Any], index: int) -> None:
        """Record a stage's first block after a loss. Before the session's first frame there is nothing to jump."""
        if stage.lost_at_s > self._first_frame_s:
            self._rebuilt.add(index)

    def _note_discontinuity(self, index: int) -> None:
        """Mark the next frame if a stage's stream was rebuilt before its block."""
        if rebuilt := {each for each in self._rebuilt if each <= index}:
            self._rebuilt -= rebuilt
            # Stages that are lost together, each with another block, make one discontinuity.
            if self._last_rebuilt is None or min(rebuilt) > self._last_rebuilt + self._in_flight.num_slots:
                self._is_discontinuity, self._last_rebuilt = True, min(rebuilt)

    def _record_latency(self, block: StartedBlock) -> None:
        """Record that the first frame of a block is there, and tell the client if blocks keep being late."""
        now_s = self._now()
        first_audio_s = self._intake.first_audio_s
        if block.turn and first_audio_s and not self._has_first_frame:
            self._has_first_frame = True
            telemetry.TIME_TO_FIRST_FRAME.record(now_s - first_audio_s)
        if self._options.is_live:
            self._timeline.block_arrived(self.outbox.end_frame, now_s - block.started_s, block.start_late_s)
            if self._timeline.num_late == LATE_BLOCKS:
                self.outbox.put(notice(api.Notice.KIND_DEGRADED, "frames are delivered later than they are due"))
