"""Batches of prepared clips, drawn from clips, seed and step alone, so a resumed run sees the batches it would have.

Axes: b batch, c channels, t latent frames, h w of latents, l encoder layers, d feature width, f pixel frames,
k blocks, n text tokens, m values of face motion.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import reduce
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from avatar.denoiser.config import NetworkConfig
from avatar.types import FACE_MOTION, FRAMES_PER_LATENT, MOTION_LATENTS
from training.codec.crops import eyes_of, lips_weight
from training.data import StoredClip

# The first channels of a latent hold what is coarse, those that a grown codec added hold detail.
NUM_COARSE_CHANNELS = 16
# Pixels on a side of a latent, in clips that do not say.
SPACE_STRIDE = 8
# The truth of synthetic people that face motion is made of.
FACE_MOTION_TRUTH = ("blink", "pose", "gaze", "reference_pose")


@dataclass(frozen=True)
class Share:
    """This process's share of a batch: every `world`-th clip from the `rank`-th on."""

    rank: int = 0
    world: int = 1

    def of(self, whole: Tensor) -> Tensor:
        """Select the share of a tensor drawn for the whole batch, (b of all processes, ...) -> (b, ...)."""
        return whole[self.rank :: self.world]

    def noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Draw standard normal noise (b, ...).

        Each clip's noise has a seed of its own, so that it does not depend on the number of processes.
        """
        b, *each = shape
        seeds = self.of(torch.randint(1 << 62, (b * self.world,), generator=generator)).tolist()
        return torch.stack([torch.randn(each, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@dataclass(frozen=True, eq=False)
class ClipBatch:
    """Blocks of clips and their conditions.

    latents: (b, c, t, h, w). reference: (b, c, 1, h, w). motion: (b, c, t, h, w) latents before the clip, oldest first:
    the still portrait, or the clip's own earlier frames. features: (b, 1, l, d, f); zeros where audio is dropped.
    text: (b, n, d); zeros without a prompt. first_block: (b,) int64 index in a stream of each clip's first block.
    weight: (b, 1, t, h, w), or by channel (b, c, t, h, w), of mean 1: weight of each latent's error in the loss.
    heard: (b, 1, l, d, f) features of the other person. face_motion: (b, m, f). has_heard, has_face_motion: (b,) 0
    where they are dropped or not known. Both inputs are (b, 0) for a network that does not take them.
    moved: (b, c, t, h, w) the references as a network's mover moves them; None: each pass computes them.
    """

    latents: Tensor
    reference: Tensor
    motion: Tensor
    features: Tensor
    text: Tensor
    first_block: Tensor
    weight: Tensor
    heard: Tensor
    has_heard: Tensor
    face_motion: Tensor
    has_face_motion: Tensor
    moved: Tensor | None = None

    def unconditional(self) -> "ClipBatch":
        """Drop both audios and text, for classifier-free guidance. Reference, moved or not, and face motion stay."""
        dropped = {name: torch.zeros_like(getattr(self, name)) for name in ("features", "text", "has_heard")}
        return self.replace(**dropped)

    def swapped(self, name: str) -> "ClipBatch":
        """Return the batch with each clip's `features`, `heard` or `face_motion` replaced by the next clip's."""
        names = (name,) if name == "features" else (name, f"has_{name}")
        return self.replace(moved=None, **{each: getattr(self, each).roll(1, 0) for each in names})

    def replace(self, **values: Any) -> "ClipBatch":
        return dataclasses.replace(self, **values)

    def to(self, device: torch.device) -> "ClipBatch":
        return self.replace(**{name: each.to(device) for name, each in vars(self).items() if each is not None})


@dataclass(frozen=True)
class BatchConfig:
    """Composition of a batch.

    batch_size: clips, of all processes together. num_blocks: range of the clips' length in blocks; one length is drawn
    per batch. lips_gain: extra loss weight at the centre of lips and eyes. detail_weight: loss weight of channels of
    detail by that of the others. At 0 the network leaves them as its mover gives them: it would blur what it cannot
    foresee. audio_dropout: share of clips whose audio is dropped, and the other person's with it. heard_dropout: share
    of the others that lose the other person's alone. face_motion_dropout: share of clips that lose face motion.
    start_share, near_share: share of clips placed at a stream's first block, and within its first 20; the others are
    placed log-uniformly up to last_block. same_position: all clips of a batch are placed at the same block, because
    self-forcing shares their caches. motion_from_clip: motion latents are the clip's own frames before its blocks, as
    far as it has them.
    """

    batch_size: int = 6
    num_blocks: tuple[int, int] = (3, 5)
    lips_gain: float = 10.0
    detail_weight: float = 1.0
    audio_dropout: float = 0.1
    heard_dropout: float = 0.1
    face_motion_dropout: float = 0.2
    start_share: float = 0.15
    near_share: float = 0.35
    last_block: int = 10000
    same_position: bool = False
    motion_from_clip: bool = False


@dataclass(frozen=True, eq=False)
class ClipSpan:
    """Blocks of one clip in a batch: from block `start` of the clip, placed at block `first_block` of a stream."""

    clip: StoredClip
    start: int
    first_block: int
    has_audio: bool = True
    has_heard: bool = True
    has_face_motion: bool = True


def draw_first_block(config: BatchConfig, rng: Generator) -> int:
    draw = rng.random()
    if draw < config.start_share:
        return 0
    if draw < config.start_share + config.near_share:
        return int(rng.integers(1, 20))
    return int(np.exp(rng.uniform(np.log(20), np.log(config.last_block))))


def draw_spans(
    clips: Sequence[StoredClip], batches: BatchConfig, config: NetworkConfig, seed: int, step: int
) -> tuple[int, list[ClipSpan]]:
    """Draw a step's batch: the number of blocks of its clips, and the spans of all processes."""
    rng = np.random.default_rng((seed, step))
    low, high = batches.num_blocks
    num_blocks = int(rng.integers(low, high + 1))
    spans = []
    for _ in range(batches.batch_size):
        clip = clips[int(rng.integers(len(clips)))]
        available = clip.array("latents").shape[1] // config.num_frames_per_block
        start = int(rng.integers(0, max(1, available - num_blocks + 1)))
        dropouts = (batches.audio_dropout, batches.heard_dropout, batches.face_motion_dropout)
        first_block = draw_first_block(batches, rng)
        has_audio, has_heard, has_motion = (bool(rng.random() >= dropout) for dropout in dropouts)
        # Guidance drops both audios together.
        spans.append(ClipSpan(clip, start, first_block, has_audio, has_audio and has_heard, has_motion))
    if batches.same_position:
        spans = [dataclasses.replace(each, first_block=spans[0].first_block) for each in spans]
    return num_blocks, spans


def read_span(span: ClipSpan, num_blocks: int, batches: BatchConfig, config: NetworkConfig) -> ClipBatch:
    """Read a span as a batch of one clip without the batch axis."""
    clip, per_block = span.clip, config.num_frames_per_block
    latent_span = slice(span.start * per_block, (span.start + num_blocks) * per_block)
    frame_span = slice(latent_span.start * FRAMES_PER_LATENT, latent_span.stop * FRAMES_PER_LATENT)

    def stored(name: str, where: slice, axis: int) -> Tensor:
        array = clip.array(name)
        return torch.from_numpy(np.array(array[(slice(None),) * axis + (where,)])).float()

    latents, motion = stored("latents", latent_span, 1), stored("motion", slice(None), 1)
    reference = motion[:, :1]
    if batches.motion_from_clip:
        before = stored("latents", slice(max(0, latent_span.start - MOTION_LATENTS), latent_span.start), 1)
        motion = torch.cat([motion, before], dim=1)[:, -MOTION_LATENTS:]
    features = stored("features", frame_span, 2) * span.has_audio
    text = stored("text", slice(None), 0) if clip.has("text") else torch.zeros(0, config.text_dim)
    text = functional.pad(text, (0, 0, 0, config.text_len - len(text)))
    weight = torch.ones_like(latents[:1])
    if clip.has("lips"):
        height, width = latents.shape[-2:]
        lips = reduce(clip.array("lips")[frame_span], "(t p) place -> t place", "mean", p=FRAMES_PER_LATENT)
        stride = clip.info.get("space_stride", SPACE_STRIDE)
        eyes: list[NDArray[np.floating]] = []
        if clip.has("pose"):
            pose = reduce(clip.array("pose")[frame_span], "(t p) angle -> t angle", "mean", p=FRAMES_PER_LATENT)
            eyes = eyes_of(lips, pose, height * stride)
        pixels = lips_weight(lips, height * stride, width * stride, batches.lips_gain, eyes=eyes)
        weight = functional.avg_pool2d(pixels, stride)
    if batches.detail_weight != 1:
        channels = torch.ones(len(latents), 1, 1, 1)
        channels[NUM_COARSE_CHANNELS:] = batches.detail_weight
        weight = weight * channels / channels.mean()
    heard = moved = torch.zeros(0)
    has_heard = span.has_heard and clip.has("heard")
    if "heard" in config.inputs:
        heard = stored("heard", frame_span, 2)[None] if has_heard else torch.zeros_like(features)[None]
    has_motion = span.has_face_motion and all(clip.has(name) for name in FACE_MOTION_TRUTH)
    if "face_motion" in config.inputs:
        moved = face_motion_of(clip)[:, frame_span] if has_motion else torch.zeros(len(FACE_MOTION), features.shape[-1])
    return ClipBatch(
        latents=latents,
        reference=reference,
        motion=motion,
        features=features[None],
        text=text,
        first_block=torch.tensor(span.first_block),
        weight=weight,
        heard=heard,
        has_heard=torch.tensor(float(has_heard)),
        face_motion=moved,
        has_face_motion=torch.tensor(float(has_motion)),
    )


def face_motion_of(clip: StoredClip) -> Tensor:
    """Return the face motion (m, f) of a clip, from the truth about it.

    Poses are relative to the reference's. Relative to the clip's mean, they would not say where the head is, and the
    network ignored them.
    """
    blink, pose, gaze, reference_pose = (np.array(clip.array(name), np.float32) for name in FACE_MOTION_TRUTH)
    return torch.from_numpy(np.concatenate([blink[None], (pose - reference_pose).T, gaze.T]))


def load_batch(
    clips: Sequence[StoredClip],
    batches: BatchConfig,
    config: NetworkConfig,
    seed: int,
    step: int,
    share: Share = Share(),
) -> ClipBatch:
    """Load this process's share of a step's batch. ValueError if the batch does not divide by the processes."""
    if batches.batch_size % share.world:
        raise ValueError(f"a batch of {batches.batch_size} clips cannot be shared by {share.world} processes")
    num_blocks, spans = draw_spans(clips, batches, config, seed, step)
    each = [read_span(span, num_blocks, batches, config) for span in spans[share.rank :: share.world]]
    names = [name for name, value in vars(each[0]).items() if value is not None]
    return ClipBatch(**{name: torch.stack([vars(clip)[name] for clip in each]) for name in names})
