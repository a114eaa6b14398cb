"""A client's speech on its way to the audio stage: turns, cut into blocks.

    add -> turns -> offline() or live() -> audio stage

Offline, audio passes through as it arrives. Live, it waits here until a block starts, and is passed on a block at a
time with a copy of the audio behind it (the lookahead), so that the audio stage can answer at once and anything may
follow the block: more speech, or silence.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from avatar.aio import WaitLimit
from avatar.worker.v1 import audio_pb2
from services.gateway.stream.in_flight import BlocksInFlight, StartedBlock, Turn
from services.gateway.stream.outbox import Outbox
from services.gateway.stream.timeline import MediaGrid, Timeline


@dataclass(frozen=True)
class LivePacing:
    """Parameters of live blocks.

    lookahead_samples: audio behind a block that its features depend on.
    patience_s: seconds that a block waits for the rest of its speech before it is idle, or filled with silence.
    remaining_s: seconds that a block takes from the end of the audio stage to its first frame.
    """

    lookahead_samples: int = 0
    patience_s: float = 0.0
    remaining_s: float = 0.0


class SpeechQueue:
    """The speech of one session.

    num_samples: samples of each channel that were added.
    unfinished: turns whose end is not in the outbox, the oldest first; the last one takes what is added.
    """

    def __init__(
        self,
        grid: MediaGrid,
        sample_bytes: int,
        in_flight: BlocksInFlight,
        pacing: LivePacing,
        turn: Turn | None = None,
        num_samples: int = 0,
        now: Callable[[], float] = time.monotonic,
        take_heard: Callable[[int, int], Sequence[audio_pb2.HeardAudio]] = lambda *_: (),
    ) -> None:
        """take_heard: returns the other person's audio up to a number of blocks, and of samples behind them."""
        self.unfinished: deque[Turn] = deque([turn or Turn(0)])
        self.num_samples = num_samples
        self._grid = grid
        self._sample_bytes = sample_bytes
        self._in_flight = in_flight
        self._pacing = pacing
        self._now = now
        self._take_heard = take_heard
        self._changed = asyncio.Event()
        self._last_added_s = 0.0
        self._is_closed = False
        # Turns with audio that was not passed on; the last one takes what is added.
        self._turns: deque[Turn] = deque(self.unfinished)
        self._next_block = 0
        self._boundaries = grid.boundaries(0)
        # Offline: the block being filled, whose speech it is, and whether it was interrupted.
        self._filling = bytearray()
        self._filling_turn: Turn | None = None
        self._is_interrupted = False

    @property
    def turn(self) -> Turn:
        """The turn that takes what is added."""
        return self._turns[-1]

    @property
    def pending_samples(self) -> int:
        """Samples that are in no block yet."""
        return (sum(len(turn.pending) for turn in self._turns) + len(self._filling)) // self._sample_bytes

    @property
    def is_closed(self) -> bool:
        """True if nothing is added any more."""
        return self._is_closed

    @property
    def waits_for_stage(self) -> bool:
        """True if there is audio that the audio stage does not take yet, or that a turn's text still gets. Offline."""
        return any(turn.pending or (turn.has_end and turn.is_voiced) for turn in self._turns)

    @property
    def has_speech(self) -> bool:
        """True if there is speech that is not admitted yet, or text whose audio is still to come."""
        started = self._in_flight.started
        return (
            self.pending_samples > 0
            or any(turn.is_voiced for turn in self._turns)
            or any(block.turn and not block.is_dropped for block in started)
        )

    def ahead_of(self, turn: Turn) -> int:
        """Return the samples up to the end of a turn that are in no admitted block, with silence in started ones."""
        ahead = len(self._filling)
        for each in self._turns:
            ahead += len(each.pending)
            if each is turn:
                break
        return ahead // self._sample_bytes + sum(block.boundaries[-1] for block in self._in_flight.started)

    def add(self, data: bytes, turn: Turn | None = None) -> None:
        """Add audio to a turn; by default to the current one."""
        turn = turn or self.turn
        num_samples, was_empty = len(data) // self._sample_bytes, not turn.pending
        turn.pending += data
        turn.num_samples += num_samples
        self.num_samples += num_samples
        self._last_added_s = self._now()
        # Audio that neither starts nor completes a block only makes it wait longer, as its timer will find.
        if was_empty or self._has_whole_block(self._next_turn()):
            self._changed.set()

    def end_turn(self) -> Turn:
        """End the current turn and return it; what is added next belongs to a new one."""
        ended = self.turn
        ended.has_end = True
        self._start_turn()
        return ended

    def finish_text(self, turn: Turn) -> None:
        """Record that no more audio of a turn's text comes."""
        assert turn.text
        turn.text.is_over = True
        self._changed.set()

    def interrupt(self) -> deque[Turn]:
        """Drop what is not admitted, end all turns, and return them in order."""
        ended = self.unfinished
        for turn in ended:
            turn.has_end = True
            turn.pending.clear()
            if turn.text and not turn.text.is_over:
                turn.text.is_over = turn.text.is_cut = True
        self._is_interrupted = self._filling_turn is not None
        self.unfinished = deque()
        self._start_turn()
        return ended

    def close(self) -> Turn:
        """End the current turn, if it has speech, and return it; nothing is added any more."""
        self._is_closed = True
        self.turn.has_end = self.turn.num_samples > 0 or self.turn.text is not None
        self._changed.set()
        return self.turn

    def _start_turn(self) -> None:
        turn = Turn(self.turn.number + 1)
        self._turns.append(turn)
        self._next_turn()  # forgets turns without audio, of which there may be many until the next block
        self.unfinished.append(turn)
        self._changed.set()

    def _next_turn(self) -> Turn:
        """Return the first turn with audio to pass on or to come, else the current one; forget the turns before it."""
        while len(self._turns) > 1:
            first = self._turns[0]
            if first.pending or first.is_voiced or self._filling_turn is first:
                break
            self._turns.popleft()
        return self._turns[0]

    def _is_done(self, turn: Turn) -> bool:
        """Return whether all audio is passed on. turn: the next one."""
        return self._is_closed and not turn.pending and not turn.is_voiced

    async def offline(self) -> AsyncGenerator[audio_pb2.AudioPiece, None]:
        """Pass audio on as it arrives; the end of a turn fills its block with silence at once."""
        while True:
            turn = self._next_turn()
            is_over = self._filling_turn is turn and turn.is_ended and not turn.pending
            is_last = self._is_closed and len(self._turns) == 1
            if self._is_interrupted or (is_over and not is_last):
                yield self._fill_up()
            elif turn.pending:
                yield self._pass_on(turn)
            elif self._is_done(turn):
                if self._filling:
                    heard = self._take_heard(self._next_block, len(self._filling) // self._sample_bytes)
                    self._start_filled()
                    if heard:
                        yield audio_pb2.AudioPiece(heard=heard)
                return
            else:
                self._changed.clear()
                await self._changed.wait()

    def _pass_on(self, turn: Turn) -> audio_pb2.AudioPiece:
        """Return the turn's next audio, at most up to the end of the block."""
        self._filling_turn = turn
        missing = self._block_bytes() - len(self._filling)
        data = bytes(turn.pending[:missing])
        del turn.pending[:missing]
        self._filling += data
        if len(data) < missing:
            return audio_pb2.AudioPiece(data=data)
        self._start_filled()
        return audio_pb2.AudioPiece(data=data, heard=self._take_heard(self._next_block, 0))

    def _fill_up(self) -> audio_pb2.AudioPiece:
        """Return silence up to the end of the block, which completes it without lookahead."""
        data = b""
        if self._filling:
            data = bytes(self._block_bytes() - len(self._filling))
            self._start_filled().is_dropped = self._is_interrupted
        self._filling_turn, self._is_interrupted = None, False
        heard = self._take_heard(self._next_block, 0)
        return audio_pb2.AudioPiece(data=data, completes=self._next_block - 1, heard=heard)

    def _start_filled(self) -> StartedBlock:
        """Start the block that is being filled, with silence where it is not full."""
        block = self._start(self._filling_turn, bytes(self._filling))
        self._filling.clear()
        return block

    def _start(
        self, turn: Turn | None, speech: bytes, due_s: float | None = None, start_late_s: float = 0.0
    ) -> StartedBlock:
        """Start the next block, which shows this speech of a turn; it has been taken out of `turn.pending`."""
        num_samples = len(speech) // self._sample_bytes
        pending = sum(len(each.pending) for each in self._turns) // self._sample_bytes
        block = StartedBlock(
            turn=turn,
            num_samples=num_samples,
            turn_offset=turn.num_samples - len(turn.pending) // self._sample_bytes - num_samples if turn else 0,
            stream_offset=self.num_samples - pending - num_samples,
            data=speech + bytes(self._block_bytes() - len(speech)),
            boundaries=self._boundaries,
            num_frames=self._grid.block_frames,
            started_s=self._now(),
            due_s=due_s,
            start_late_s=start_late_s,
        )
        self._in_flight.started.append(block)
        self._next_block += 1
        self._boundaries = self._grid.boundaries(self._next_block)
        return block

    def _block_bytes(self) -> int:
        """Return the size of the next block's audio; at rates that 25 does not divide, blocks differ by a sample."""
        return self._boundaries[-1] * self._sample_bytes

    async def live(self, timeline: Timeline, outbox: Outbox) -> AsyncGenerator[audio_pb2.AudioPiece, None]:
        """Start a block of speech as soon as there is one, at most a block early, and an idle block when one is due."""
        limit = WaitLimit()
        while True:
            await self._in_flight.take_slot()
            while (wait_s := self._wait_s(timeline.start_by_s(self._hold(timeline, outbox)))) > 0:
                self._changed.clear()
                with suppress(TimeoutError), limit:
                    limit.set(wait_s)
                    await self._changed.wait()
            turn = self._next_turn()
            if self._is_done(turn):
                return
            frame = self._hold(timeline, outbox)
            start_late_s = timeline.start_block(frame)
            yield self._live_piece(turn, timeline.due_s(frame), start_late_s)

    def _hold(self, timeline: Timeline, outbox: Outbox) -> int:
        """Hold the timeline at the next frame to come, if one is in flight; return the next block's first frame.

        Blocks that take longer than they last must not pile up: the timeline is delayed instead.
        """
        num_frames = self._in_flight.num_frames
        if num_frames:
            timeline.hold(outbox.end_frame)
        return outbox.end_frame + num_frames

    def _wait_s(self, start_by_s: float) -> float:
        """Return how many seconds to wait before the next block is started; 0 to start it now.

        start_by_s: when it has to start at the latest.
        """
        now_s, turn = self._now(), self._next_turn()
        if self._is_done(turn):
            return 0.0
        if self._has_whole_block(turn):
            return max(0.0, start_by_s - self._grid.block_s - now_s)
        if now_s < start_by_s:
            return start_by_s - now_s
        needed = self._block_bytes() + self._pacing.lookahead_samples * self._sample_bytes
        missing_s = (needed - len(turn.pending)) / self._sample_bytes / self._grid.rate_hz
        if turn.pending and missing_s <= self._pacing.patience_s:
            # The rest may arrive in time; give up waiting once nothing has arrived for a while.
            return max(0.0, min(start_by_s, self._last_added_s) + self._pacing.patience_s - now_s)
        return 0.0

    def _has_whole_block(self, turn: Turn) -> bool:
        """Return whether a turn has the audio of a block and its lookahead, or will get no more."""
        needed = self._block_bytes() + self._pacing.lookahead_samples * self._sample_bytes
        return len(turn.pending) >= needed or (turn.is_ended and bool(turn.pending))

    def _live_piece(self, turn: Turn, due_s: float, start_late_s: float) -> audio_pb2.AudioPiece:
        """Start a block and return its audio: speech if it is complete or no more arrives, else silence before it."""
        has_stopped = self._now() - self._last_added_s >= self._pacing.patience_s
        size = self._block_bytes() if self._has_whole_block(turn) or (turn.pending and has_stopped) else 0
        speech = bytes(turn.pending[:size])
        del turn.pending[:size]
        block = self._start(turn if speech else None, speech, due_s, start_late_s)
        lookahead = bytes(turn.pending[: self._pacing.lookahead_samples * self._sample_bytes]) if speech else b""
        return audio_pb2.AudioPiece(
            data=block.data,
            completes=self._next_block - 1,
            behind=lookahead,
            slack_s=due_s - self._pacing.remaining_s - self._now(),
            heard=self._take_heard(self._next_block, 0),
        )
