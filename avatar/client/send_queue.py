"""Requests on their way to the gateway: which may have to be sent again, and how far live audio is ahead."""

import time
from collections import deque
from dataclasses import dataclass

from avatar.client.items import Frame, Item, PlaybackFinished
from avatar.errors import ConnectionLost
from avatar.v1 import avatar_service_pb2 as pb

# HTTP/2's flow-control windows bound what is in flight, so a connection that breaks loses no more than this.
MAX_KEPT_BYTES = 8 << 20
# Size of a request without audio.
REQUEST_BYTES = 128
# Longest reaction to expect of a deployment that promises none, because it is slower than real time, in seconds.
UNPROMISED_S = 10.0


@dataclass(eq=False)
class QueuedRequest:
    """A request, and whether it has left the queue: it was written, or an interrupt discarded it."""

    request: pb.StreamAvatarRequest
    is_done: bool = False

    @property
    def num_bytes(self) -> int:
        audio_bytes = len(self.request.audio.data) + len(self.request.listen.data)
        return REQUEST_BYTES + audio_bytes + 4 * len(self.request.say.text)


class SendQueue:
    """Pending requests, and written ones that the gateway may not have received yet, in order."""

    def __init__(self) -> None:
        self._pending: deque[QueuedRequest] = deque()
        # The latest written requests. Of all written ones the first `_num_discarded` cannot be sent again.
        self._written: deque[QueuedRequest] = deque()
        self._num_written = self._num_discarded = 0
        self._written_bytes = 0

    def add(self, request: pb.StreamAvatarRequest) -> QueuedRequest:
        """Append a request. An interrupt discards the pending requests before it."""
        if request.HasField("interrupt"):
            self.discard()
        self._pending.append(queued := QueuedRequest(request))
        return queued

    def has_next(self) -> bool:
        """Return whether a request is pending."""
        return bool(self._pending)

    def take(self) -> pb.StreamAvatarRequest:
        """Remove and return the next request to write.

        Beyond `MAX_KEPT_BYTES` the oldest written requests are dropped: the gateway must have received them.
        """
        queued = self._pending.popleft()
        queued.is_done = True
        self._written.append(queued)
        self._num_written += 1
        self._written_bytes += queued.num_bytes
        while self._written_bytes > MAX_KEPT_BYTES and len(self._written) > 1:
            self._written_bytes -= self._written.popleft().num_bytes
            self._num_discarded = self._num_written - len(self._written)
        return queued.request

    def discard(self) -> None:
        """Discard pending requests, and treat written ones as delivered: after an interrupt neither is needed.

        What the avatar listens to stays: an interrupt does not concern it.
        """
        for queued in self._pending:
            queued.is_done = not queued.request.HasField("listen")
        self._pending = deque(queued for queued in self._pending if not queued.is_done)
        self._written.clear()
        self._written_bytes = 0

    def rewind(self, num_received: int) -> None:
        """Queue all written requests after the first `num_received` again, before the pending ones.

        Raises ConnectionLost if one of them was dropped.
        """
        if num_received < self._num_discarded:
            num_lost = self._num_discarded - num_received
            raise ConnectionLost(f"{num_lost} messages were not delivered and are no longer kept")
        first = self._num_written - len(self._written)
        missing = [queued for number, queued in enumerate(self._written, first) if number >= num_received]
        self._pending.extendleft(reversed(missing))
        self._written.clear()
        self._num_written, self._num_discarded, self._written_bytes = num_received, 0, 0


class AudioLead:
    """Samples that live audio is ahead of the frames received: an upper bound of the gateway's own count.

    A frame of speech advances the shown position by one frame's samples. In a block that starts or ends with silence
    the frames show less speech than that, so the lead may be underestimated by up to a block; the limit is lowered by
    a block to allow for it, and the end of a turn corrects it. Frames of a turn of text show none of the audio. Offline
    streams have no limit, since the gateway reads only as fast as it renders.
    """

    def __init__(self, opening: pb.OpenAvatar, limits: pb.GetCapabilitiesResponse) -> None:
        rate_hz, frame_rate_hz = opening.audio.rate_hz, limits.video.frame_rate_hz
        block_s = limits.block_frames / frame_rate_hz
        limit_s = max(limits.max_live_ahead_s - block_s, limits.max_live_ahead_s / 2)
        self._limit = limit_s * rate_hz if opening.mode == pb.OpenAvatar.MODE_LIVE else float("inf")
        self._frame_samples = rate_hz / frame_rate_hz
        # An idle frame this long after the last audio means that all of it has been shown.
        self._quiet_s = 1 + 2 * (limits.reaction_s or UNPROMISED_S)
        self._sent, self._shown = 0, 0.0
        # Turns that have ended and are not shown to their end: samples sent up to there, and whether it is of text.
        self._turn_ends: deque[tuple[int, bool]] = deque()
        self._is_text = False
        self._sent_at = 0.0

    def has_room(self, num_samples: int) -> bool:
        """Return whether the gateway accepts this many more samples."""
        ahead = self._sent - self._shown
        return ahead <= 0 or ahead + num_samples <= self._limit

    def add(self, num_samples: int) -> None:
        """Count samples per channel that are sent."""
        self._sent += num_samples
        self._sent_at = time.monotonic()

    def end_turn(self) -> None:
        """Record the end of a turn at the current position."""
        self._turn_ends.append((self._sent, self._is_text))
        self._is_text = False

    def say(self) -> None:
        """Record that the current turn is of text."""
        self._is_text = True

    def update(self, item: Item) -> None:
        """Advance the shown position by an item from the gateway."""
        match item:
            case Frame(is_idle=False):
                until, is_text = self._turn_ends[0] if self._turn_ends else (self._sent, self._is_text)
                if not is_text:
                    self._shown = min(self._shown + item.num_frames * self._frame_samples, until)
            case Frame() if time.monotonic() - self._sent_at > self._quiet_s:
                self.reset()
            case PlaybackFinished(was_interrupted=False) if self._turn_ends:
                self._shown = max(self._shown, self._turn_ends.popleft()[0])

    def reset(self) -> None:
        """Set the lead to zero: all audio was shown, or dropped by an interrupt."""
        self._shown = self._sent
        self._turn_ends.clear()
        self._is_text = False
