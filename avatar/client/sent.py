"""What a client knows of what it has sent: how far its sound is ahead, and what may not have arrived."""

import time
from collections import deque
from dataclasses import dataclass

from avatar.client.items import Frame, Item, PlaybackFinished
from avatar.errors import ConnectionLost
from avatar.v1 import avatar_service_pb2 as pb

# What is under way is bounded by HTTP/2's windows; a connection that breaks loses no more.
MAX_KEPT_BYTES = 8 << 20


@dataclass(eq=False)
class Kept:
    """A request, and whether it was taken to be written or is no longer to be."""

    request: pb.StreamAvatarRequest
    is_taken: bool = False


class Sent:
    """What is to be written, and what was and may not have arrived, in order."""

    def __init__(self) -> None:
        self._waiting: deque[Kept] = deque()
        # What was written last. Of all that was written, the first `_num_lost` are no longer kept and may be missed.
        self._written: deque[Kept] = deque()
        self._num_written = self._num_lost = 0
        self._num_bytes = 0

    def add(self, request: pb.StreamAvatarRequest) -> Kept:
        """Have a request written. An interrupt drops what is before it."""
        if request.HasField("interrupt"):
            self.forget()
        self._waiting.append(kept := Kept(request))
        return kept

    def has_next(self) -> bool:
        """Whether there is something to write."""
        return bool(self._waiting)

    def take(self) -> pb.StreamAvatarRequest:
        """What to write next. The oldest of what was written is forgotten: it must have arrived."""
        kept = self._waiting.popleft()
        kept.is_taken = True
        self._written.append(kept)
        self._num_written += 1
        self._num_bytes += len(kept.request.audio.data)
        while self._num_bytes > MAX_KEPT_BYTES and len(self._written) > 1:
            self._num_bytes -= len(self._written.popleft().request.audio.data)
            self._num_lost = self._num_written - len(self._written)
        return kept.request

    def forget(self) -> None:
        """What was written has arrived, or need not; what was not is not to be."""
        for kept in self._waiting:
            kept.is_taken = True
        self._waiting.clear()
        self._written.clear()
        self._num_bytes = 0

    def rewind(self, num_arrived: int) -> None:
        """Have what has not arrived written again: all but so many. ConnectionLost if it is no longer kept."""
        if num_arrived < self._num_lost:
            raise ConnectionLost(f"{self._num_lost - num_arrived} messages did not arrive and are no longer kept")
        first = self._num_written - len(self._written)
        missing = [kept for number, kept in enumerate(self._written, first) if number >= num_arrived]
        self._waiting.extendleft(reversed(missing))
        self._written.clear()
        self._num_written, self._num_lost, self._num_bytes = num_arrived, 0, 0


class Lead:
    """How far live sound is ahead of what is shown: never less than what the gateway counts.

    Speech moves it by what a frame shows. A block that begins or ends with silence shows less speech than its frames
    last, so a lead may seem up to a block shorter than it is, which the limit allows for; the end of a turn sets it
    right. Offline there is no limit: the gateway reads no faster than it draws.
    """

    def __init__(self, opening: pb.OpenAvatar, limits: pb.GetCapabilitiesResponse) -> None:
        rate_hz, frame_rate_hz = opening.audio.rate_hz, limits.video.frame_rate_hz
        block_s = limits.block_frames / frame_rate_hz
        limit_s = max(limits.max_live_ahead_s - block_s, limits.max_live_ahead_s / 2)
        self._limit = limit_s * rate_hz if opening.mode == pb.OpenAvatar.MODE_LIVE else float("inf")
        self._frame_samples = rate_hz / frame_rate_hz
        # What was sent so long ago has been shown, if nobody speaks now.
        self._quiet_s = 1 + 2 * limits.reaction_s
        self._sent, self._shown = 0, 0.0
        self._turn_ends: deque[int] = deque()
        self._sent_at = 0.0

    def has_room(self, num_samples: int) -> bool:
        """Whether so many samples more are taken."""
        ahead = self._sent - self._shown
        return ahead <= 0 or ahead + num_samples <= self._limit

    def sent(self, num_samples: int) -> None:
        """Samples of each channel are on their way."""
        self._sent += num_samples
        self._sent_at = time.monotonic()

    def turn_ended(self) -> None:
        """What was sent so far is a turn."""
        if self._sent > (self._turn_ends[-1] if self._turn_ends else self._shown):
            self._turn_ends.append(self._sent)

    def came(self, item: Item) -> None:
        """Something came from the gateway."""
        match item:
            case Frame(is_idle=False):
                until = self._turn_ends[0] if self._turn_ends else self._sent
                self._shown = min(self._shown + item.num_frames * self._frame_samples, until)
            case Frame() if time.monotonic() - self._sent_at > self._quiet_s:
                self.dropped()
            case PlaybackFinished(was_interrupted=False) if item.position_s > 0 and self._turn_ends:
                self._shown = max(self._shown, self._turn_ends.popleft())

    def dropped(self) -> None:
        """Nothing of what was sent waits."""
        self._shown = self._sent
        self._turn_ends.clear()
