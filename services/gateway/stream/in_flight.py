"""Blocks between the decision to make them and their last frame, and how many of them there may be.

    start -> (audio stage) -> admit -> (levels, VAE) -> finish

Offline, a block takes its slot when it is admitted; live, when it is started, so that its audio is not decided earlier
than necessary. No slot is given while no client is connected.
"""

import asyncio
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

# The first frames of a session belong to the decoder's start, and are not delivered.
FIRST_FRAME = 3


@dataclass(frozen=True, slots=True)
class SpokenWord:
    """A word of a turn's text. start: sample of the turn's audio where it begins. first_char, end_char: its place."""

    start: int
    first_char: int
    end_char: int
    is_estimated: bool


@dataclass(eq=False)
class TurnText:
    """The text of one turn, and how much of it the voice has spoken.

    language: empty for the voice's default. first_sample: of the turn's audio whose words are to be shown.
    words: those whose audio has come, in order. num_spoken: characters whose audio has come, to the end of a sentence.
    spoken_samples: samples up to there. num_samples: samples that have come, the delivered ones too.
    is_over: no more audio comes. is_cut: it is over before its end.
    """

    language: str = ""
    first_sample: int = 0
    text: str = ""
    words: list[SpokenWord] = field(default_factory=list)
    num_spoken: int = 0
    spoken_samples: int = 0
    num_samples: int = 0
    is_over: bool = False
    is_cut: bool = False
    _num_shown: int = 0

    def shown_until(self, sample: int) -> Iterator[SpokenWord]:
        """Yield the words that begin before a sample of the turn's audio, each once; not those delivered before."""
        while self._num_shown < len(self.words) and self.words[self._num_shown].start < sample:
            word = self.words[self._num_shown]
            self._num_shown += 1
            if word.start >= self.first_sample:
                yield word

    def spoken(self, num_samples: int) -> str:
        """Return the text of so many samples of the turn's audio: up to the last word that begins there."""
        if self.is_over and not self.is_cut and num_samples >= self.num_samples:
            return self.text
        at = bisect_left(self.words, num_samples, key=lambda word: word.start)
        return self.text[: self.words[at - 1].end_char] if at else ""


@dataclass(eq=False)
class Turn:
    """Speech between two ends of turns.

    pending: audio that is in no block yet.
    num_samples: samples of all its audio. num_finished: those whose frames have all been put into the outbox.
    has_end: its end has come. has_audio: the client sent audio. text: what the client sent in place of audio.
    """

    number: int
    pending: bytearray = field(default_factory=bytearray)
    num_samples: int = 0
    num_finished: int = 0
    has_end: bool = False
    has_audio: bool = False
    is_started: bool = False
    text: TurnText | None = None

    @property
    def is_voiced(self) -> bool:
        """True if audio of its text is still to come."""
        return self.text is not None and not self.text.is_over

    @property
    def is_ended(self) -> bool:
        """True if no more audio follows."""
        return self.has_end and not self.is_voiced

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
