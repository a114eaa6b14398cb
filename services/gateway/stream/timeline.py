"""A session's frames and samples in integers, and when each frame of a live stream is due.

`MediaGrid` cuts audio into blocks and frames. `Timeline` says when a block has to start so that its first frame is
there when it is due, and by how much it was late.
"""

import time
from collections import deque
from collections.abc import Callable

# A block counts as late if its first frame comes more than this many seconds after it was due.
TOLERANCE_S = 0.04
# Latency margin, in seconds: the next block may take this much longer than recent ones and is still on time.
MARGIN_S = 0.03
US = 1_000_000


class MediaGrid:
    """Positions of frames and samples of one session, both counted from the start of block 0.

    Every position is computed from its number and nothing is accumulated, so hours of media do not drift.
    """

    def __init__(self, rate_hz: int, frame_rate_hz: int, block_frames: int) -> None:
        self.rate_hz = rate_hz
        self.frame_rate_hz = frame_rate_hz
        self.block_frames = block_frames
        self.block_s = block_frames / frame_rate_hz

    def sample(self, frame: int) -> int:
        """Return the first sample of a frame."""
        return -(-frame * self.rate_hz // self.frame_rate_hz)

    def boundaries(self, block: int) -> list[int]:
        """Return the first sample of each of a block's frames and of the next block, counted from the block's start."""
        first = block * self.block_frames
        start = self.sample(first)
        return [self.sample(first + frame) - start for frame in range(self.block_frames + 1)]

    def duration_us(self, num_samples: int) -> int:
        """Return the duration of audio, in microseconds."""
        return num_samples * US // self.rate_hz


class Timeline:
    """The due times of a live stream's frames.

    The first frame after a restart is due as soon as its block can be made, and each other frame 1 / frame rate after
    the one before. A frame that is not there when it is due moves itself and all later frames back.

    block_latency_s: seconds from the start of a block to its first frame, as workers report it; recent blocks may show
    that it takes longer. now: clock, in seconds.
    num_late: blocks in a row, up to the last one, whose first frame was late by more than TOLERANCE_S.
    """

    def __init__(self, grid: MediaGrid, block_latency_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self.num_late = 0
        self._grid = grid
        self._block_latency_s = block_latency_s
        self._now = now
        self._latencies: deque[float] = deque(maxlen=8)
        self._origin_s = 0.0  # when frame 0 was due
        self._is_restarted = True  # no block was started since the last restart
        self._held_s = 0.0  # by how much `hold` moved frames back since the last block's first frame

    @property
    def lead_s(self) -> float:
        """Seconds that a block has to start before its first frame is due, latency margin included."""
        # The second longest: after a single hiccup the next blocks would otherwise start early, and react late.
        recent = sorted(self._latencies)[-2:-1] or [0.0]
        limit = self._block_latency_s + self._grid.block_s
        return max(self._block_latency_s, min(recent[0], limit)) + MARGIN_S

    def due_s(self, frame: int) -> float:
        """Return when a frame is due, in seconds of the clock."""
        return self._origin_s + frame / self._grid.frame_rate_hz

    def start_by_s(self, frame: int) -> float:
        """Return when the block that begins with a frame has to start, in seconds of the clock."""
        return self.due_s(frame) - self.lead_s

    def restart(self, frame: int) -> None:
        """Forget earlier due times, and have a frame due now: a client connected, or speech was interrupted.

        The start of the frame's block then moves it back by the time that the block takes.
        """
        self._origin_s = self._now() - frame / self._grid.frame_rate_hz
        self._is_restarted = True
        self._held_s = 0.0

    def hold(self, frame: int) -> None:
        """Move a frame that is still being made, and all after it, back to now if it is overdue."""
        self._held_s += max(0.0, self._delay_until(frame, self._now()))

    def start_block(self, frame: int) -> float:
        """Start the block of a frame now, which moves the frame back if too little time remains to make it.

        Returns by how many seconds the start is late, negative if it is early. The first block after a restart is
        never late: it could not start before.
        """
        late_s = self._delay_until(frame, self._now() + self.lead_s)
        is_restarted, self._is_restarted = self._is_restarted, False
        return 0.0 if is_restarted else late_s

    def block_arrived(self, frame: int, latency_s: float, start_late_s: float = 0.0) -> float:
        """Record that a block's first frame comes from the VAE stage now.

        latency_s: seconds since the block started. start_late_s: the result of `start_block` for it.
        Returns by how many seconds the block is late.
        """
        self._latencies.append(latency_s)
        late_s = max(start_late_s, self._delay_until(frame, self._now()) + self._held_s)
        self._held_s = 0.0
        self.num_late = self.num_late + 1 if late_s > TOLERANCE_S else 0
        return late_s

    def _delay_until(self, frame: int, ready_s: float) -> float:
        """Delay a frame until it is ready, if it is late; return by how much it is late, negative if it is early."""
        late_s = ready_s - self.due_s(frame)
        self._origin_s += max(0.0, late_s)
        return late_s
