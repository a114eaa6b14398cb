"""Batches of prepared clips, decided by clips, seed and step: a resumed run sees what it would have seen.

Axes: b batch, c channels, t latent frames, h w of latents, l encoder layers, d feature width, f pixel frames,
k blocks, n text tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from einops import rearrange, reduce
from numpy.random import Generator
from torch import Tensor
from torch.nn import functional

from avatar.denoiser.config import FRAMES_PER_LATENT, NetworkConfig
from training.crops import lips_weight
from training.data import StoredClip

LATENT_PIXELS = 8


@dataclass(frozen=True, eq=False)
class ClipBatch:
    """Blocks of clips, and what they are made under.

    latents: (b, c, t, h, w). motion: (b, c, t, h, w) the portrait held still, latent 0 the reference.
    features: (b, 1, l, d, f); zeros where there is nothing to be heard. text: (b, n, d), n = 0 without a prompt.
    first_block: (b,) int64, where in a stream each clip stands. weight: (b, 1, t, h, w), of mean 1, how much errors
    count.
    """

    latents: Tensor
    motion: Tensor
    features: Tensor
    text: Tensor
    first_block: Tensor
    weight: Tensor

    @property
    def reference(self) -> Tensor:
        """(b, c, 1, h, w)."""
        return self.motion[:, :, :1]

    def silent(self) -> "ClipBatch":
        """The same without sound and text: what guidance moves away from. The portrait stays."""
        return self.replaced(features=torch.zeros_like(self.features), text=torch.zeros_like(self.text))

    def replaced(self, **values: Tensor) -> "ClipBatch":
        return ClipBatch(**{field.name: values.get(field.name, getattr(self, field.name)) for field in fields(self)})

    def part(self, rank: int, world: int) -> "ClipBatch":
        """This rank's share of the batch."""
        return ClipBatch(*(getattr(self, field.name)[rank::world] for field in fields(self)))


@dataclass(frozen=True)
class BatchRule:
    """What a batch is.

    batch: clips. num_blocks: of each, one number for a whole batch, drawn anew for each from low..high.
    lips: how much more errors count at the lips. silence: share of clips whose sound is left out.
    at_start, near: share of clips that stand at a stream's first block, and within its first 20; the others stand
    anywhere up to the last block, evenly on a logarithmic scale.
    """

    batch: int = 6
    num_blocks: tuple[int, int] = (3, 5)
    lips: float = 10.0
    silence: float = 0.1
    at_start: float = 0.15
    near: float = 0.35
    last_block: int = 10000


def draw_first_block(rule: BatchRule, rng: Generator) -> int:
    choice = rng.random()
    if choice < rule.at_start:
        return 0
    if choice < rule.at_start + rule.near:
        return int(rng.integers(1, 20))
    return int(np.exp(rng.uniform(np.log(20), np.log(rule.last_block))))


def read_blocks(clip: StoredClip, start: int, num_blocks: int, rule: BatchRule, config: NetworkConfig) -> list[Tensor]:
    """A clip's latents, motion, features, text and weight, from block `start`."""
    per_block = config.num_frames_per_block
    span = slice(start * per_block, (start + num_blocks) * per_block)
    heard = slice(span.start * FRAMES_PER_LATENT, span.stop * FRAMES_PER_LATENT)

    def stored(name: str, where: slice, axis: int) -> Tensor:
        array = clip.array(name)
        return torch.from_numpy(np.array(array[(slice(None),) * axis + (where,)])).float()

    latents, features = stored("latents", span, 1), stored("features", heard, 2)
    text = stored("text", slice(None), 0) if clip.has("text") else torch.zeros(0, config.text_dim)
    weight = torch.ones_like(latents[:1])
    if clip.has("lips"):
        height, width = latents.shape[-2:]
        lips = reduce(clip.array("lips")[heard], "(t p) place -> t place", "mean", p=FRAMES_PER_LATENT)
        pixels = lips_weight(lips, height * LATENT_PIXELS, width * LATENT_PIXELS, rule.lips)
        weight = functional.avg_pool2d(pixels, LATENT_PIXELS)
    return [latents, stored("motion", slice(None), 1), features[None], text, weight]


def batch_of(clips: Sequence[StoredClip], rule: BatchRule, config: NetworkConfig, seed: int, step: int) -> ClipBatch:
    """The batch of a step."""
    rng = np.random.default_rng((seed, step))
    low, high = rule.num_blocks
    num_blocks = int(rng.integers(low, high + 1))
    columns: list[list[Tensor]] = []
    firsts, heard = [], []
    for _ in range(rule.batch):
        clip = clips[int(rng.integers(len(clips)))]
        there = clip.array("latents").shape[1] // config.num_frames_per_block
        start = int(rng.integers(0, max(1, there - num_blocks + 1)))
        columns.append(read_blocks(clip, start, num_blocks, rule, config))
        firsts.append(draw_first_block(rule, rng))
        heard.append(float(rng.random() >= rule.silence))
    latents, motion, features, text, weight = (torch.stack(each) for each in zip(*columns, strict=True))
    features = features * rearrange(torch.tensor(heard), "b -> b 1 1 1 1")
    return ClipBatch(latents, motion, features, text, torch.tensor(firsts), weight)
