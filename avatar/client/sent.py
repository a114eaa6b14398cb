"""What a client knows of what it has sent: how far its sound is ahead, and what may not have arrived."""

import time
from collections import deque
from dataclasses import dataclass

from avatar.client.items import Frame, Item, PlaybackFinished
from avatar.errors import ConnectionLost
from avatar.v1 import avatar_service_pb2 as pb

# What is under way is bounded by HTTP/2's windows; a connection that breaks loses no more.
MAX_KEPT_BYTES = 8 << 20
# What was written so long before the gateway was last heard has arrived.
ARRIVED_S = 0.5


@dataclass
class Kept:
    """A request, the samples before it, and when it was taken to be written."""

    start: int
    request: pb.StreamAvatarRequest
    taken_at: float = float("inf")


class Sent:
    """What is to be written, and what was and may not have arrived, in order.

    num_samples: samples of each channel in all of it, from the first on. num_taken: requests that were taken to be
    written, or are no longer to be. sample_bytes: bytes of one sample of every channel.
    """

    def __init__(self, sample_bytes: int) -> None:
        self.num_samples = 0
        self.num_taken = 0
        self._num_added = 0
        self._sample_bytes = sample_bytes
        self._kept: deque[Kept] = deque()
        self._num_bytes = 0

    def add(self, request: pb.StreamAvatarRequest) -> int:
        """Have a request written; its number. An interrupt drops what is before it."""
        if request.HasField("interrupt"):
            self.forget()
        self._kept.append(Kept(self.num_samples, request))
        self.num_samples += self._length(request)
        self._num_bytes += len(request.audio.data)
        self._num_added += 1
        return self._num_added - 1

    def has_next(self) -> bool:
        """Whether there is something to write."""
        return self.num_taken < self._num_added

    def take(self) -> pb.StreamAvatarRequest:
        """What to write next. The oldest of what was written is forgotten: it must have arrived."""
        taken = self._kept[self.num_taken - self._num_added]
        taken.taken_at = time.monotonic()
        self.num_taken += 1
        while self._num_bytes > MAX_KEPT_BYTES and len(self._kept) > self._num_added - self.num_taken + 1:
            self._drop_first()
        return taken.request

    def forget(self) -> None:
        """What was written has arrived, or need not; what was not is not to be."""
        if self.has_next():
            self.num_samples = self._kept[self.num_taken - self._num_added].start
        self._kept.clear()
        self._num_bytes = 0
        self.num_taken = self._num_added

    def rewind(self, arrived: int, heard_at: float) -> None:
        """Have what has not arrived written again. ConnectionLost if it is no longer kept.

        arrived: samples of each channel that the gateway has. heard_at: when it was last heard, by time.monotonic. The
        gateway counts no marks: of one behind the last sample, a turn's end say, that decides.
        """
        first = self._kept[0].start if self._kept else self.num_samples
        if missing := max(0, first - arrived):
            if not (self._kept and self._kept[0].request.HasField("interrupt")):
                raise ConnectionLost(f"{missing} samples did not arrive and are no longer kept")
            for each in self._kept:
                each.start -= missing
            self.num_samples -= missing
        while self._kept and self._has_arrived(self._kept[0], arrived, heard_at):
            self._drop_first()
        if self._kept and (start := self._kept[0].start) < arrived:
            data = self._kept[0].request.audio.data[(arrived - start) * self._sample_bytes :]
            self._kept[0] = Kept(arrived, pb.StreamAvatarRequest(audio=pb.AudioPiece(data=data)))
        self.num_taken = self._num_added - len(self._kept)

    def _has_arrived(self, kept: Kept, arrived: int, heard_at: float) -> bool:
        if length := self._length(kept.request):
            return kept.start + length <= arrived
        if kept.request.HasField("end_turn") and kept.start == arrived:
            return kept.taken_at + ARRIVED_S < heard_at
        return kept.start < arrived

    def _length(self, request: pb.StreamAvatarRequest) -> int:
        return len(request.audio.data) // self._sample_bytes

    def _drop_first(self) -> None:
        self._num_bytes -= len(self._kept.popleft().request.audio.data)


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
