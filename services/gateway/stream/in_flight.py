"""Blocks between the decision to make them and their last frame, and how many of them there may be.

    start -> (audio stage) -> admit -> (levels, VAE) -> finish

Offline, a block takes its slot when it is admitted; live, when it is started, so that its audio is not decided earlier
than necessary. No slot is given while no client is connected.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

# The first frames of a session belong to the decoder's start, and are not delivered.
FIRST_FRAME = 3


@dataclass(eq=False)
class Turn:
    """Speech between two ends of turns.

    pending: audio that is in no block yet.
    num_samples: samples of all its audio. num_finished: those whose frames have all been put into the outbox.
    """

    number: int
    pending: bytearray = field(default_factory=bytearray)
    num_samples: int = 0
    num_finished: int = 0
    is_ended: bool = False
    is_started: bool = False

    @property
    def is_over(self) -> bool:
        """True if it has ended and all its frames have been put into the outbox."""
        return self.is_ended and self.num_finished == self.num_samples


@dataclass(eq=False)
class StartedBlock:
    """The audio and the timing of one block, of speech or idle.

    turn: whose speech it shows; None if it is idle. num_samples: samples of speech in it; silence follows them.
    turn_offset, stream_offset: samples of the turn, and of all audio of the client, before it.
    data: the samples of the whole block. boundaries: first sample of each frame, then the number of samples.
    num_frames: frames that are still to be put into the outbox.
    started_s: when it was started. due_s: when its first frame is due; None if the stream is not live. Both in seconds
        of `time.monotonic`. start_late_s: by how much the start was late.
    has_frames: its first frame came. is_dropped: its frames are not wanted.
    """

    turn: Turn | None
    num_samples: int
    turn_offset: int
    stream_offset: int
    data: bytes
    boundaries: Sequence[int]
    num_frames: int
    started_s: float
    due_s: float | None = None
    start_late_s: float = 0.0
    has_frames: bool = False
    is_dropped: bool = False


class BlocksInFlight:
    """The blocks of one session that were started and are not finished.

    started: given to the audio stage, not admitted. admitted: in the pipeline behind it. The oldest come first.
    due_s: when each admitted block's first frame is due, by its index; None if the stream is not live.
    num_slots: number of slots. connected: set while a client is connected.
    """

    def __init__(self, num_stages: int) -> None:
        """num_stages: stages behind the audio stage."""
        # One block for each stage keeps all of them busy, and one waits to enter; up to two are between stages, which
        # counts where steps are as short as 20 ms.
        self.num_slots = num_stages + 3
        self.started: deque[StartedBlock] = deque()
        self.admitted: deque[StartedBlock] = deque()
        self.connected = asyncio.Event()
        self.due_s: dict[int, float | None] = {}
        self._slots = asyncio.Semaphore(self.num_slots)

    @property
    def num_frames(self) -> int:
        """Frames still to be put into the outbox, those of dropped blocks left out."""
        return sum(block.num_frames for block in (*self.admitted, *self.started) if not block.is_dropped)

    @property
    def has_speech(self) -> bool:
        """True if an admitted block shows speech that is still wanted."""
        return any(block.turn and not block.is_dropped for block in self.admitted)

    async def take_slot(self) -> None:
        """Wait for a free slot, and for a client."""
        await self._slots.acquire()
        await self.connected.wait()

    def admit(self) -> StartedBlock | None:
        """Move the oldest started block into the pipeline; free its slot and return None if it was dropped."""
        block = self.started.popleft()
        if block.is_dropped:
            self._slots.release()
            return None
        self.admitted.append(block)
        return block

    def number(self, block: StartedBlock, index: int) -> None:
        """Give an admitted block its index in the session."""
        self.due_s[index] = block.due_s
        if index == 0:
            block.num_frames -= FIRST_FRAME

    def finish(self, index: int) -> None:
        """Remove the oldest admitted block, whose frames have all come, and free its slot."""
        self.admitted.popleft()
        del self.due_s[index]
        self._slots.release()

    def drop(self) -> None:
        """Drop the frames of all blocks. Admitted ones run through to the end: states cannot go back."""
        for block in (*self.admitted, *self.started):
            block.is_dropped = True
