"""A client's sound on its way to the audio stage: turns of speech, cut into blocks, with silence where there is none.

Offline, sound passes through as it comes. Live, it waits here and is passed on by the block, with a copy of the sound
behind it, so that a block is complete the moment it is begun, and whatever comes next may follow it: speech or silence.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field

from avatar.worker.v1 import audio_pb2
from services.gateway.stream.timeline import Grid, Playout


@dataclass(eq=False)
class Turn:
    """What is said between two ends of turns.

    pending: sound that is not in a block yet.
    num_samples: of all its sound. num_drawn: of that whose frames are on their way out.
    """

    number: int
    pending: bytearray = field(default_factory=bytearray)
    num_samples: int = 0
    num_drawn: int = 0
    is_ended: bool = False
    is_started: bool = False


@dataclass(eq=False)
class BlockSound:
    """The sound of one block, from the decision to draw it until its last frame is on its way out.

    index: of the block, counted as the audio stage does. number: its index once it is admitted.
    turn: whose speech it is; None where it is idle.
    before: samples of the turn before it. num_samples: of the turn in it; silence follows them.
    data: samples of the whole block.
    first_sample: samples of the client's before it.
    num_left: its frames that are not on their way out yet.
    begun_s, late_s: when it was begun, and by how much that was late. due_s: when it is shown; None where nobody waits.
    is_shown: its first frame came. is_dropped: its frames are not wanted.
    """

    index: int
    turn: Turn | None
    before: int
    num_samples: int
    data: bytes
    first_sample: int
    num_left: int
    begun_s: float
    due_s: float | None = None
    number: int | None = None
    late_s: float = 0.0
    is_shown: bool = False
    is_dropped: bool = False


class Sound:
    """The sound of one session.

    num_samples: of each channel, that were taken.
    begun: blocks that the audio stage has been given, or is being given, and that are not admitted yet.
    unfinished: turns whose end is not on its way out, the oldest first; the last is the one that is being said.
    """

    def __init__(
        self, grid: Grid, sample_bytes: int, now: Callable[[], float], turn: Turn | None = None, num_samples: int = 0
    ) -> None:
        self.begun: deque[BlockSound] = deque()
        self.unfinished: list[Turn] = [turn or Turn(0)]
        self.num_samples = num_samples
        self.changed = asyncio.Event()
        self._grid = grid
        self._sample_bytes = sample_bytes
        self._now = now
        self._heard_s = 0.0
        self._is_closed = False
        # What is not passed on yet, but for the last: that is being said.
        self._turns: deque[Turn] = deque(self.unfinished)
        self._next_block = 0
        self._filling = bytearray()
        self._filled_of: Turn | None = None
        self._is_cut = False

    @property
    def turn(self) -> Turn:
        """The turn that is being said."""
        return self._turns[-1]

    @property
    def pending_samples(self) -> int:
        """Samples that are in no block yet."""
        return (sum(len(turn.pending) for turn in self._turns) + len(self._filling)) // self._sample_bytes

    @property
    def ahead_samples(self) -> int:
        """Samples that are in no block which is admitted."""
        return self.pending_samples + sum(block.num_samples for block in self.begun)

    @property
    def is_speaking(self) -> bool:
        """Whether there is speech that is not admitted yet."""
        return self.pending_samples > 0 or any(block.turn and not block.is_dropped for block in self.begun)

    def take(self, data: bytes) -> None:
        """Take sound of the turn that is being said."""
        turn = self.turn
        turn.pending += data
        turn.num_samples += len(data) // self._sample_bytes
        self.num_samples += len(data) // self._sample_bytes
        self._heard_s = self._now()
        self.changed.set()

    def end_turn(self) -> Turn:
        """End the turn that is being said; what comes is the next one's."""
        ended = self.turn
        ended.is_ended = True
        self._begin_turn()
        return ended

    def interrupt(self) -> list[Turn]:
        """Drop what is not admitted; the turns that this ends."""
        ended = self.unfinished
        for turn in ended:
            turn.is_ended = True
            turn.pending.clear()
        for block in self.begun:
            block.is_dropped = True
        self._is_cut = self._filled_of is not None
        self.unfinished = []
        self._begin_turn()
        return [turn for turn in ended if turn.num_samples]

    def close(self) -> Turn:
        """No more sound comes; the turn that this ends."""
        self._is_closed = True
        self.turn.is_ended = True
        self.changed.set()
        return self.turn

    def _begin_turn(self) -> None:
        turn = Turn(self.turn.number + 1)
        self._turns.append(turn)
        self.unfinished.append(turn)
        self.changed.set()

    def _pass_over(self) -> Turn:
        """The first turn that has something to pass on; else the one that is being said."""
        while len(self._turns) > 1 and not self._turns[0].pending and self._filled_of is not self._turns[0]:
            self._turns.popleft()
        return self._turns[0]

    async def offline(self) -> AsyncGenerator[audio_pb2.AudioPiece, None]:
        """Sound as it comes; the end of a turn fills its block with silence, and is passed on at once."""
        while True:
            turn = self._pass_over()
            if self._is_cut or (self._filled_of is turn and turn.is_ended and not turn.pending and not self._is_last()):
                yield self._fill_up()
            elif turn.pending:
                yield self._pass_on(turn)
            elif self._is_closed:
                if self._filling:
                    self._settle()
                return
            else:
                self.changed.clear()
                await self.changed.wait()

    def _is_last(self) -> bool:
        return self._is_closed and len(self._turns) == 1

    def _pass_on(self, turn: Turn) -> audio_pb2.AudioPiece:
        """The turn's next sound, at most up to the end of the block."""
        self._filled_of = turn
        room = self._block_bytes() - len(self._filling)
        data = bytes(turn.pending[:room])
        del turn.pending[:room]
        self._filling += data
        if len(self._filling) == self._block_bytes():
            self._settle()
        return audio_pb2.AudioPiece(data=data)

    def _fill_up(self) -> audio_pb2.AudioPiece:
        """Silence up to the end of the block, which is then not waited for."""
        data = b""
        if self._filling:
            data = bytes(self._block_bytes() - len(self._filling))
            block = self._settle()
            block.is_dropped = self._is_cut
        self._filled_of, self._is_cut = None, False
        return audio_pb2.AudioPiece(data=data, completes=self._next_block - 1)

    def _settle(self) -> BlockSound:
        """The block that is being filled, with silence where it is not full, is begun."""
        turn = self._filled_of
        assert turn is not None
        block = self._begin(turn, bytes(self._filling))
        self._filling.clear()
        return block

    def _begin(self, turn: Turn | None, spoken: bytes) -> BlockSound:
        data = spoken + bytes(self._block_bytes() - len(spoken))
        num_samples = len(spoken) // self._sample_bytes
        before = 0
        if turn is not None:
            before = turn.num_samples - len(turn.pending) // self._sample_bytes - num_samples
        num_left = self._grid.block_frames
        waiting = sum(len(turn.pending) for turn in self._turns) // self._sample_bytes
        first_sample = self.num_samples - waiting - num_samples
        block = BlockSound(self._next_block, turn, before, num_samples, data, first_sample, num_left, self._now())
        self.begun.append(block)
        self._next_block += 1
        return block

    def _block_bytes(self) -> int:
        start = self._grid.block_end(self._next_block - 1)
        return (self._grid.block_end(self._next_block) - start) * self._sample_bytes

    async def live(
        self,
        playout: Playout,
        first_frame: Callable[[], int],
        behind_samples: int,
        patience_s: float,
        until_free: Callable[[], Awaitable[object]],
    ) -> AsyncGenerator[audio_pb2.AudioPiece, None]:
        """A block whenever there is one of speech, at most a block early; and silence where there is none, in time.

        first_frame: number of the frame that the next block will begin with.
        behind_samples: sound behind a block that is heard for it. until_free: waits until the next block may be begun.
        """
        while True:
            await until_free()
            while (wait_s := self._wait_s(playout.deadline_s(first_frame()), behind_samples, patience_s)) > 0:
                self.changed.clear()
                try:
                    async with asyncio.timeout(wait_s):
                        await self.changed.wait()
                except TimeoutError:
                    pass
            turn = self._pass_over()
            if self._is_closed and not turn.pending:
                return
            frame = first_frame()
            late_s = playout.begun(frame)
            due_s = playout.shown_s(frame)
            piece = self._whole_block(turn, behind_samples, patience_s)
            self.begun[-1].late_s, self.begun[-1].due_s = late_s, due_s
            yield piece

    def _wait_s(self, deadline_s: float, behind_samples: int, patience_s: float) -> float:
        """How long the next block's beginning may, or must, be put off; 0 for not at all."""
        now, turn = self._now(), self._pass_over()
        if self._is_closed and not turn.pending:
            return 0.0
        if self._is_whole(turn, behind_samples):
            return max(0.0, deadline_s - self._grid.block_s - now)
        if now < deadline_s:
            return deadline_s - now
        whole_bytes = self._block_bytes() + behind_samples * self._sample_bytes
        missing_s = (whole_bytes - len(turn.pending)) / self._sample_bytes / self._grid.rate_hz
        if turn.pending and missing_s <= patience_s:
            # It may be there in time; but not if nothing more comes.
            return max(0.0, min(deadline_s, self._heard_s) + patience_s - now)
        return 0.0

    def _is_whole(self, turn: Turn, behind_samples: int) -> bool:
        """Whether the turn has a block's sound with what is behind it, or will have no more."""
        needed = self._block_bytes() + behind_samples * self._sample_bytes
        return len(turn.pending) >= needed or (turn.is_ended and bool(turn.pending))

    def _whole_block(self, turn: Turn, behind_samples: int, patience_s: float) -> audio_pb2.AudioPiece:
        """Speech if it is whole, or if no more of it comes; else silence, in front of what there is of it."""
        is_over = self._now() - self._heard_s >= patience_s
        size = self._block_bytes() if self._is_whole(turn, behind_samples) or (turn.pending and is_over) else 0
        spoken = bytes(turn.pending[:size])
        del turn.pending[:size]
        block = self._begin(turn if spoken else None, spoken)
        behind = bytes(turn.pending[: behind_samples * self._sample_bytes]) if spoken else b""
        return audio_pb2.AudioPiece(data=block.data, completes=self._next_block - 1, behind=behind)
