"""What a codec is: pictures to latents and back, the way back as a stream."""

from typing import Protocol, TypeVar

from torch import Tensor

State = TypeVar("State")


class Codec(Protocol[State]):
    """Frames to latents for whole clips, latents to frames for streams; no knowledge of sessions and blocks.

    Axes: b batch, c channels, t latent frames, f pixel frames, h w height and width of latents, H W of frames.

    In time a codec is causal and its first latent frame stands for one pixel frame, every later one for four. It keeps
    nothing between calls: one codec serves any number of streams, each with a state of its own. Latents are
    normalised, of about unit variance. Inputs may have any floating point type and be on any device; results are on
    the codec's.

    channels: c. space_stride: H / h = W / w.
    history: how far back a decoder sees, in latent frames. A state that has decoded that many of a stream's latents,
        after any others, holds the same bytes as the stream's own.
    """

    @property
    def channels(self) -> int: ...

    @property
    def space_stride(self) -> int: ...

    @property
    def history(self) -> int: ...

    def encode(self, frames: Tensor) -> Tensor:
        """frames: (b, 3, f, H, W) in [-1, 1]. Returns (b, c, t, h, w), t = 1 + (f - 1) // 4; frames that do not fill
        a latent are left out."""
        ...

    def fresh(self) -> State:
        """The state of a stream that has seen nothing."""
        ...

    def decode(self, latents: Tensor, state: State) -> Tensor:
        """latents: (b, c, t, h, w), the stream's next; state is moved on in place. Returns (b, 3, f, H, W), f = 4 t,
        or 1 + 4 (t - 1) with a fresh state, about [-1, 1] and not clamped."""
        ...
