"""The items that stages pass on, and the constants and conditions of a session.

    AudioPiece --audio--> Block (features) --denoiser 0..N-1--> Block (latent) --> LatentFrame --vae--> FrameChunk

Axes: c latent channels, t latent frames, f pixel frames, h w height and width (of latents, or of pixels in frames),
l encoder layers, d feature width, n text tokens, m values of face motion, a audio channels or, of features and masks,
actors, s samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    # For type checking only: modules that need only the sizes below load no tensor library.
    from torch import Tensor

# Pixel frames of a latent frame: the stride in time of every codec.
FRAMES_PER_LATENT = 4
# Frame rate of every video: audio features are computed for it.
FRAME_RATE_HZ = 25
# Latent frames of a block where a checkpoint states no number (`num_frames_per_block`): the public weights'.
BLOCK_LATENTS = 3
MAX_BLOCK_LATENTS = 3
# Values of face motion: how closed the lids are, 0 to 1; pitch (positive looks down), yaw (positive to the right of the
# picture) and roll of the head in radians from its pose in the picture; direction of the eyes, right and up of the
# viewer, in radians.
FACE_MOTION = ("blink", "pitch", "yaw", "roll", "gaze_right", "gaze_up")
# Motion latents of a session, which are 73 pixel frames. Source: Wan2.2-S2V.
MOTION_LATENTS = 19


@dataclass(frozen=True, eq=False)
class Session:
    """The constants of one session.

    id: unguessable name.
    seed: 0 <= seed < 2**63; all of the session's randomness comes from it and from block indexes.
    motion: (c, t, h, w) float32 motion latents, of a still clip of the picture; latent 0 is the reference latent.
    masks: (a, rows, columns) float32, the weight of each actor's audio at each picture token; None for one actor. The
        reference implementation takes masks per frame but uses the first block's for all: masks are constant.
    sink_update_block: the first block whose sink is block 0's result; 0: the picture stays the sink.
    sink_distance: latent frames from a block's first frame to the sink ahead of it: fixed, or drawn from low..high.
    audio_right_frames: right context of audio features, in encoder frames after a block.
    None stands for the checkpoint's default (except masks).
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
    """A version of the session's conditions, from which prefill computes condition keys and values.

    version: numbered from 0.
    sink: (c, 1, h, w) float32, the latent of the sink frame, which carries the identity.
    text: (n, d) embedding of the prompt, without padding, in the text encoder's dtype; n = 0 without a prompt.
    """

    version: int
    sink: Tensor
    text: Tensor

    def with_sink(self, latent: Tensor) -> Conditions:
        """Return the next version, whose sink is the first frame of a clean latent (c, t, h, w)."""
        return Conditions(self.version + 1, latent[:, :1].float(), self.text)


@dataclass(frozen=True, eq=False)
class HeardAudio:
    """Audio of the other person, whom the session's person listens to.

    samples: (a, s) float32 in [-1, 1], a = 1 or 2. rate_hz: samples per second, the same in all of a stream.
    first_sample: number of samples[:, 0] since the start of the stream's own audio, at rate_hz.
    """

    samples: Tensor
    rate_hz: int
    first_sample: int


@dataclass(frozen=True, eq=False)
class AudioPiece:
    """Audio of any length.

    samples: (a, s) float32 in [-1, 1].
    rate_hz: samples per second.
    is_last: the audio ends here; silence completes the last block.
    completes: index of the block that ends with these samples and is encoded at once; None: blocks wait for the audio
        after them.
    behind: (a, s) float32 right context for that block; it comes again in later pieces. None: silence.
    due_s: deadline of that block at this stage, in seconds of this process's `time.monotonic`; None: no deadline.
    heard: audio of the other person that has arrived since the piece before; it ends with these samples at the latest.
    """

    samples: Tensor
    rate_hz: int
    is_last: bool = False
    completes: int | None = None
    behind: Tensor | None = None
    due_s: float | None = None
    heard: Sequence[HeardAudio] = ()


@dataclass(frozen=True, eq=False)
class Block:
    """The latent frames that are denoised together, and their inputs.

    index: position in the session, from 0.
    features: (l, d, f) float32 audio features of each pixel frame; (a, l, d, f) if the session has masks.
    latent: (c, t, h, w); None before level 0.
    conditions: of this block; None until it is admitted.
    traceparent: W3C trace context of this block; empty if it is not traced.
    pose: (c, t, h, w) latents of a pose video; None without one.
    due_s: deadline at this stage, in seconds of this process's `time.monotonic`; None: no deadline.
    statistics: of the audio stage after this block, for a stream that is resumed after it.
    heard: (l, d, f) float32 features of what is heard from the other person; None where nobody is heard.
    face_motion: (m, f) float32 values in the order of `FACE_MOTION`; None: the network moves the face by itself.
    noise: (c, t, h, w) float32 noise that level 0 starts from, drawn ahead of its step; None: the step draws it.
    moved: (c, t, h, w) the reference as an earlier level moved it; None: a network with a mover moves it itself.
    """

    index: int
    features: Tensor
    latent: Tensor | None = None
    conditions: Conditions | None = None
    traceparent: str = ""
    pose: Tensor | None = None
    due_s: float | None = None
    statistics: bytes = b""
    heard: Tensor | None = None
    face_motion: Tensor | None = None
    noise: Tensor | None = None
    moved: Tensor | None = None


@dataclass(frozen=True, eq=False)
class LatentFrame:
    """One latent frame of a clean block: the decoder takes them one by one.

    index: position in the session, from 0.
    latent: (c, 1, h, w).
    block: index of its block. is_last: it is the block's last one.
    traceparent: the block's.
    due_s: deadline at the decoder, in seconds of this process's `time.monotonic`; None: no deadline.
    """

    index: int
    latent: Tensor
    block: int
    is_last: bool
    traceparent: str = ""
    due_s: float | None = None


@dataclass(frozen=True, eq=False)
class FrameChunk:
    """The pixel frames of one latent frame.

    block: index of its block. is_last: no other chunk of the block follows.
    first_frame: number of frames[0] in the session; a frame's time is its number / frame rate.
    frames: (f, h, w, 3) uint8 RGB; f = 1 for the session's first latent frame, 4 for every other.
    """

    block: int
    is_last: bool
    first_frame: int
    frames: Tensor
    traceparent: str = ""
