"""Batches of prepared clips, decided by clips, seed and step: a resumed run sees what it would have seen.

Axes: b batch, c channels, t latent frames, h w of latents, l encoder layers, d feature width, f pixel frames,
k blocks, n text tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from einops import reduce
from numpy.random import Generator
from torch import Tensor
from torch.nn import functional

from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.layers import MOTION_FRAMES
from avatar.types import FRAMES_PER_LATENT
from training.codec.crops import lips_weight
from training.data import StoredClip

LATENT_PIXELS = 8


@dataclass(frozen=True)
class Share:
    """Which of a batch's clips are this process's: every world-th from the rank-th."""

    rank: int = 0
    world: int = 1

    def of(self, whole: Tensor) -> Tensor:
        """The share of what was drawn for the whole batch, (b of all, ...) -> (b, ...)."""
        return whole[self.rank :: self.world]

    def noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Standard normal (b, ...): each clip's from a seed of its own, so that nobody draws what others need."""
        b, *each = shape
        seeds = self.of(torch.randint(1 << 62, (b * self.world,), generator=generator)).tolist()
        return torch.stack([torch.randn(each, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@dataclass(frozen=True, eq=False)
class ClipBatch:
    """Blocks of clips, and what they are made under.

    latents: (b, c, t, h, w). reference: (b, c, 1, h, w). motion: (b, c, t, h, w) what went before, oldest first: the
    portrait held still, or frames.
    features: (b, 1, l, d, f); zeros where there is nothing to be heard. text: (b, n, d), zeros without a prompt.
    first_block: (b,) int64, where in a stream each clip stands. weight: (b, 1, t, h, w), of mean 1, how much errors
    count.
    """

    latents: Tensor
    reference: Tensor
    motion: Tensor
    features: Tensor
    text: Tensor
    first_block: Tensor
    weight: Tensor

    def silent(self) -> "ClipBatch":
        """The same without sound and text: what guidance moves away from. The portrait stays."""
        return self.replaced(features=torch.zeros_like(self.features), text=torch.zeros_like(self.text))

    def replaced(self, **values: Tensor) -> "ClipBatch":
        return ClipBatch(**{field.name: values.get(field.name, getattr(self, field.name)) for field in fields(self)})

    def to(self, device: torch.device) -> "ClipBatch":
        return self.replaced(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


@dataclass(frozen=True)
class BatchRule:
    """What a batch is.

    batch: clips, of all processes. num_blocks: of each, one number for a whole batch, drawn anew for each from
    low..high. lips: how much more errors count at the lips. silence: share of clips whose sound is left out.
    at_start, near: share of clips that stand at a stream's first block, and within its first 20; the others stand
    anywhere up to the last block, evenly on a logarithmic scale. together: all stand where the first does, since in
    rollouts they share caches. follow: motion is the clip's own frames before the block, as far as there are any.
    """

    batch: int = 6
    num_blocks: tuple[int, int] = (3, 5)
    lips: float = 10.0
    silence: float = 0.1
    at_start: float = 0.15
    near: float = 0.35
    last_block: int = 10000
    together: bool = False
    follow: bool = False


@dataclass(frozen=True, eq=False)
class Choice:
    """A clip in a batch: its blocks from `start`, put at `first_block` of a stream."""

    clip: StoredClip
    start: int
    first_block: int
    is_heard: bool


def draw_first_block(rule: BatchRule, rng: Generator) -> int:
    choice = rng.random()
    if choice < rule.at_start:
        return 0
    if choice < rule.at_start + rule.near:
        return int(rng.integers(1, 20))
    return int(np.exp(rng.uniform(np.log(20), np.log(rule.last_block))))


def draw_choices(
    clips: Sequence[StoredClip], rule: BatchRule, config: NetworkConfig, seed: int, step: int
) -> tuple[int, list[Choice]]:
    """How many blocks the clips of a step's batch have, and which they are."""
    rng = np.random.default_rng((seed, step))
    low, high = rule.num_blocks
    num_blocks = int(rng.integers(low, high + 1))
    choices = []
    for _ in range(rule.batch):
        clip = clips[int(rng.integers(len(clips)))]
        there = clip.array("latents").shape[1] // config.num_frames_per_block
        start = int(rng.integers(0, max(1, there - num_blocks + 1)))
        choices.append(Choice(clip, start, draw_first_block(rule, rng), bool(rng.random() >= rule.silence)))
    if rule.together:
        choices = [replace(each, first_block=choices[0].first_block) for each in choices]
    return num_blocks, choices


def read_blocks(choice: Choice, num_blocks: int, rule: BatchRule, config: NetworkConfig) -> list[Tensor]:
    """A clip's latents, reference, motion, features, text, place in the stream, and weight."""
    clip, per_block = choice.clip, config.num_frames_per_block
    span = slice(choice.start * per_block, (choice.start + num_blocks) * per_block)
    heard = slice(span.start * FRAMES_PER_LATENT, span.stop * FRAMES_PER_LATENT)

    def stored(name: str, where: slice, axis: int) -> Tensor:
        array = clip.array(name)
        return torch.from_numpy(np.array(array[(slice(None),) * axis + (where,)])).float()

    latents, motion = stored("latents", span, 1), stored("motion", slice(None), 1)
    reference = motion[:, :1]
    if rule.follow:
        before = stored("latents", slice(max(0, span.start - MOTION_FRAMES), span.start), 1)
        motion = torch.cat([motion, before], dim=1)[:, -MOTION_FRAMES:]
    features = stored("features", heard, 2) * choice.is_heard
    text = stored("text", slice(None), 0) if clip.has("text") else torch.zeros(0, config.text_dim)
    text = functional.pad(text, (0, 0, 0, config.text_len - len(text)))
    weight = torch.ones_like(latents[:1])
    if clip.has("lips"):
        height, width = latents.shape[-2:]
        lips = reduce(clip.array("lips")[heard], "(t p) place -> t place", "mean", p=FRAMES_PER_LATENT)
        pixels = lips_weight(lips, height * LATENT_PIXELS, width * LATENT_PIXELS, rule.lips)
        weight = functional.avg_pool2d(pixels, LATENT_PIXELS)
    return [latents, reference, motion, features[None], text, torch.tensor(choice.first_block), weight]


def batch_of(
    clips: Sequence[StoredClip],
    rule: BatchRule,
    config: NetworkConfig,
    seed: int,
    step: int,
    share: Share = Share(),
) -> ClipBatch:
    """This process's share of the batch of a step. ValueError if the processes cannot share it evenly."""
    if rule.batch % share.world:
        raise ValueError(f"a batch of {rule.batch} clips cannot be shared by {share.world} processes")
    num_blocks, choices = draw_choices(clips, rule, config, seed, step)
    mine = choices[share.rank :: share.world]
    columns = zip(*(read_blocks(choice, num_blocks, rule, config) for choice in mine), strict=True)
    return ClipBatch(*(torch.stack(column) for column in columns))
