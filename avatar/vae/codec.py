"""The interface of video codecs: frames to latents for whole clips, latents to frames for streams."""

from typing import Protocol, TypeVar

from torch import Tensor

State = TypeVar("State")


class Codec(Protocol[State]):
    """An encoder and a decoder of video, causal in time, independent of sessions and blocks.

    Axes: b batch, c channels, t latent frames, f pixel frames, h w height and width of latents, H W of frames.

    The first latent frame of a clip stands for one pixel frame, every later one for four. A codec keeps nothing between
    calls: it serves any number of streams, each with its own state. Latents are normalised, of about unit variance.
    Inputs may have any floating point dtype and be on any device; results are on the codec's.

    channels: c. space_stride: H / h = W / w.
    history: how many past latent frames a decoder depends on. A state that has decoded that many of a stream's latents,
        after any others, holds the same bytes as the stream's own.
    """

    channels: int
    space_stride: int
    history: int

    def encode(self, frames: Tensor) -> Tensor:
        """Encode frames (b, 3, f, H, W) in [-1, 1] to latents (b, c, t, h, w), t = 1 + (f - 1) // 4.

        Trailing frames that do not fill a latent are dropped.
        """
        ...

    def new_state(self) -> State:
        """Return the decoder state of a new stream."""
        ...

    def state_bytes(self, state: State) -> int:
        """Return the memory of a decoder state, in bytes."""
        ...

    def decode(self, latents: Tensor, state: State) -> Tensor:
        """Decode the stream's next latents (b, c, t, h, w), and update state in place.

        Returns (b, 3, f, H, W), about [-1, 1] and not clamped; f = 4 t, or 1 + 4 (t - 1) with a new state.
        """
        ...
