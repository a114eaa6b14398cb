"""Audio of any rate and number of channels to mono PCM16 of one rate."""

import av
from av.audio.frame import AudioFrame


class Resampler:
    """Converts audio of any rate and number of channels to mono PCM16 of one rate."""

    def __init__(self, rate_hz: int) -> None:
        self._resampler = av.AudioResampler(format="s16", layout="mono", rate=rate_hz)

    def __call__(self, frame: AudioFrame) -> bytes:
        """Convert a frame."""
        return b"".join(bytes(each.planes[0])[: each.samples * 2] for each in self._resampler.resample(frame))
