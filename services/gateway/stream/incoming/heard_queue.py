"""Audio of the person whom the avatar listens to, on its way to the audio stage.

    HeardAudio of the client -> add -> take, when a block is cut -> HeardAudio of the worker contract

Live, audio is placed where it arrives: it ends with the block at the latest, and a block waits for none. Offline, it is
placed one sample behind the other from the stream's beginning.
"""

from avatar.errors import ProtocolOrder
from avatar.worker.v1 import audio_pb2
from services.gateway.options import StreamOptions
from services.gateway.stream.timeline import MediaGrid

# Live: audio that arrived and may wait for the next block. It evens out the jitter of its arrival.
MAX_SURPLUS_S = 0.2


class HeardQueue:
    """The other person's audio that no block has taken yet."""

    def __init__(self, options: StreamOptions, grid: MediaGrid, max_ahead_s: float) -> None:
        """grid: of the stream's own audio. max_ahead_s: seconds of audio that are kept."""
        self._format = options.heard
        self._grid = MediaGrid(self._format.rate_hz, grid.frame_rate_hz, grid.block_frames)
        self._own_rate_hz = grid.rate_hz
        self._is_live = options.is_live
        self._max_ahead_s = max_ahead_s
        self._pending = bytearray()
        # Number of the first sample after what blocks have taken.
        self._next = 0

    def add(self, data: bytes) -> None:
        """Add whole samples. Live, drop the oldest beyond the limit; offline, ProtocolOrder."""
        self._pending += data
        limit = round(self._max_ahead_s * self._format.rate_hz) * self._format.sample_bytes
        if len(self._pending) <= limit:
            return
        if not self._is_live:
            raise ProtocolOrder(
                f"more than {self._max_ahead_s:g} s of `listen` wait for audio of the same time; send audio between"
            )
        del self._pending[:-limit]

    def take(self, num_blocks: int, num_samples: int = 0) -> list[audio_pb2.HeardAudio]:
        """Remove and return what comes before a time: so many blocks, and samples of the stream's own audio.

        Nothing is returned if nothing has arrived. Times must ascend.
        """
        rate_hz, sample_bytes = self._format.rate_hz, self._format.sample_bytes
        end = self._grid.sample(num_blocks * self._grid.block_frames) + num_samples * rate_hz // self._own_rate_hz
        num_pending = len(self._pending) // sample_bytes
        if self._is_live and num_pending:
            self._next = max(self._next, end - num_pending)
            surplus = num_pending - (end - self._next)
            if surplus > MAX_SURPLUS_S * rate_hz:
                del self._pending[: surplus * sample_bytes]
        size = max(0, end - self._next) * sample_bytes
        data = bytes(self._pending[:size])
        del self._pending[:size]
        if not data:
            return []
        heard = audio_pb2.HeardAudio(
            data=data,
            encoding=self._format.encoding,
            rate_hz=rate_hz,
            num_channels=self._format.num_channels,
            first_sample=self._next,
        )
        self._next += len(data) // sample_bytes
        return [heard]
