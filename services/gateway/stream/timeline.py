"""A session's clocks, in integers: which samples a frame has, when it is shown, and when its block must be begun."""

import time
from collections import deque
from collections.abc import Callable

# A block may come so much later than it is shown before it counts as late.
TOLERANCE_S = 0.04
# What a block may take longer than it took of late.
MARGIN_S = 0.03
US = 1_000_000


class Grid:
    """Frames and samples of one session, both counted from the beginning of block 0.

    Nothing is ever added up: each place is computed from its number, so that hours do not drift.
    """

    def __init__(self, rate_hz: int, frame_rate_hz: int, block_frames: int) -> None:
        self.rate_hz = rate_hz
        self.frame_rate_hz = frame_rate_hz
        self.block_frames = block_frames
        self.block_s = block_frames / frame_rate_hz

    def sample(self, frame: int) -> int:
        """The first sample of a frame."""
        return -(-frame * self.rate_hz // self.frame_rate_hz)

    def block_end(self, block: int) -> int:
        """The first sample behind a block."""
        return self.sample((block + 1) * self.block_frames)

    def pts_us(self, frame: int) -> int:
        """When a frame is shown, in microseconds."""
        return frame * US // self.frame_rate_hz

    def duration_us(self, num_samples: int) -> int:
        """How long so many samples sound, in microseconds."""
        return num_samples * US // self.rate_hz


class Playout:
    """When a live client shows each frame: the first when it comes, each other in its turn, later if it comes later.

    promise_s: how long a block is known to take from its beginning to its first frame, until that is measured.
    """

    def __init__(self, grid: Grid, promise_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self.now = now
        self._grid = grid
        self._promise_s = promise_s
        self._taken: deque[float] = deque(maxlen=8)
        self._start_s = 0.0
        self._is_fresh = True
        self._overdue_s = 0.0

    @property
    def lead_s(self) -> float:
        """How long before its first frame is shown a block must be begun."""
        # The second longest: one hiccup must not make the next blocks early, and so what is said late.
        longest = sorted(self._taken)[-2:-1] or [0.0]
        return max(self._promise_s, min(longest[0], self._promise_s + self._grid.block_s)) + MARGIN_S

    def restart(self, frame: int) -> None:
        """This frame would be shown now."""
        self._start_s = self.now() - frame / self._grid.frame_rate_hz
        self._is_fresh = True
        self._overdue_s = 0.0

    def overdue(self, frame: int) -> None:
        """This frame, which is being made, has not come yet: it is not shown before now."""
        self._overdue_s += max(0.0, self._not_before(frame, self.now()))

    def deadline_s(self, frame: int) -> float:
        """When the block that begins with this frame must be begun."""
        return self.shown_s(frame) - self.lead_s

    def shown_s(self, frame: int) -> float:
        """When a frame is shown."""
        return self._start_s + frame / self._grid.frame_rate_hz

    def begun(self, frame: int) -> float:
        """The block of this frame is begun now, and cannot be shown before it is made; by how much that is late.

        The first after a restart is not late: it could not be begun before.
        """
        late_s = self._not_before(frame, self.now() + self.lead_s)
        is_fresh, self._is_fresh = self._is_fresh, False
        return 0.0 if is_fresh else late_s

    def came(self, frame: int, taken_s: float) -> float:
        """The first frame of a block came, so long after its beginning; by how much it is late, in seconds."""
        self._taken.append(taken_s)
        late_s = self._not_before(frame, self.now()) + self._overdue_s
        self._overdue_s = 0.0
        return late_s

    def _not_before(self, frame: int, shown_s: float) -> float:
        late_s = shown_s - self.shown_s(frame)
        self._start_s += max(0.0, late_s)
        return late_s
