"""What travels between stages, and what a session is made of.

    AudioPiece --audio--> Block (features) --denoiser 0..N-1--> Block (latent) --vae--> FrameChunk

Axes: c latent channels, t latent frames, f pixel frames, h w height and width (of latents or pixels, as said),
l encoder layers, d feature width, n text tokens, a audio channels or, of features and masks, actors, s samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # Only for types: what needs the sizes below alone loads no tensor library.
    from torch import Tensor

# A block is 3 latent frames, which are 12 pixel frames, which last 0.48 s at 25 frames/s. Audio encoders and VAE are
# written for this size; tests run denoisers of other sizes (`NetworkConfig.num_frames_per_block`).
FRAMES_PER_LATENT = 4
BLOCK_LATENTS = 3
BLOCK_FRAMES = BLOCK_LATENTS * FRAMES_PER_LATENT
BLOCK_S = 0.48


@dataclass(frozen=True, eq=False)
class Session:
    """The constants of one conversation.

    id: unguessable name.
    seed: 0 <= seed < 2**63; all of the session's randomness comes from it and from block indexes.
    motion: (c, t, h, w) float32 motion latents, the reference picture held still; latent 0 is the reference latent.
    masks: (a, rows, columns) float32, how much each picture token hears each actor; None where one person speaks. The
        reference takes masks for a clip's frames and reads those of the first block for every block: they stand still.
    sink_update_block: the first block made under a sink taken from block 0's result; 0: the picture stays the sink.
    sink_distance: latent frames from a block's first frame to the sink ahead of it: fixed, or drawn from low..high.
    audio_right_frames: encoder frames of sound behind a block that its features see.
    What is None is the checkpoint's choice.
    """

    id: str
    seed: int
    motion: Tensor
    masks: Tensor | None = None
    sink_update_block: int | None = None
    sink_distance: int | tuple[int, int] | None = None
    audio_right_frames: int | None = None


@dataclass(frozen=True, eq=False)
class Conditions:
    """What prefill turns into condition keys and values, numbered from 0.

    sink: (c, 1, h, w) float32, the identity's latent.
    text: (n, d) embedding of the prompt, without padding; n = 0 if there is none. Of the text encoder's dtype.
    """

    version: int
    sink: Tensor
    text: Tensor

    def with_sink(self, latent: Tensor) -> Conditions:
        """The next version, whose sink is the first frame of a finished block's latent (c, t, h, w)."""
        return Conditions(self.version + 1, latent[:, :1].float(), self.text)


@dataclass(frozen=True, eq=False)
class AudioPiece:
    """Sound of any length.

    samples: (a, s) float32 in [-1, 1].
    rate_hz: samples per second.
    is_last: the sound ends here; what is left of a block is filled with silence.
    completes: the block that the samples end, which is wanted at once; None where it waits for the sound behind it.
    behind: (a, s) float32 sound behind that block, which is heard for it and comes again; None is silence.
    due_s: when that block must leave the stage, in seconds of this process's `time.monotonic`; None if nobody waits.
    """

    samples: Tensor
    rate_hz: int
    is_last: bool = False
    completes: int | None = None
    behind: Tensor | None = None
    due_s: float | None = None


@dataclass(frozen=True, eq=False)
class Block:
    """The latent frames that are denoised together, with what they are made from.

    index: position in the session, from 0.
    features: (l, d, f) float32 audio features of each pixel frame; (a, l, d, f) where the session has masks.
    latent: (c, t, h, w); None before level 0.
    conditions: what the block is made under; None until it is admitted.
    traceparent: W3C trace context of this block; empty if it is not traced.
    pose: (c, t, h, w) latents of a pose video, None where there is none.
    due_s: when it must leave the stage, in seconds of this process's `time.monotonic`; None if nobody waits.
    statistics: what the audio stage has accumulated up to this block, for a stream that is rebuilt behind it.
    """

    index: int
    features: Tensor
    latent: Tensor | None = None
    conditions: Conditions | None = None
    traceparent: str = ""
    pose: Tensor | None = None
    due_s: float | None = None
    statistics: bytes = b""


@dataclass(frozen=True, eq=False)
class FrameChunk:
    """The pixel frames of one block.

    index: the block's.
    first_frame: number of frames[0] in the session; a frame's time is its number / frame rate.
    frames: (f, h, w, 3) uint8 RGB.
    """

    index: int
    first_frame: int
    frames: Tensor
    traceparent: str = ""
