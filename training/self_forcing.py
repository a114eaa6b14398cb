"""Self-forcing: generate clips block by block, each block conditioned on the blocks generated before it.

The caches are the product's, one per level, so training meets the conditions of serving: a history at the level's own
noise, detached from gradients, and a sink at serving's positions.

Source: Self-Forcing (arXiv 2506.08009).

Axes: b batch, c channels, t latent frames, h w of latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from avatar.denoiser.attention import reference_frame
from avatar.denoiser.cache import KeysValues, KVCache
from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.model import Network, to_velocity
from avatar.denoiser.sampler import SAMPLERS, autoregressive, timesteps
from training.batches import ClipBatch, Share
from training.clips import encode_inputs, moved_reference


class DetachedHistory:
    """A KV cache as the history of a block with gradients: they reach the block's own keys and values only."""

    visible = None

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache

    def extend(self, layer: int, k: Tensor, v: Tensor) -> KeysValues:
        keys, values = self._cache.extend(layer, k.detach(), v.detach())
        if not k.requires_grad:
            return keys, values
        own = self._cache.current
        # Copies, because later blocks write into the cache while this graph still needs its values.
        return (
            torch.cat([keys[:, : own.start], k, keys[:, own.stop :]], dim=1),
            torch.cat([values[:, : own.start], v, values[:, own.stop :]], dim=1),
        )


@dataclass(eq=False)
class BlockwiseGeneration:
    """Generation of a batch of clips, block by block.

    batch: the clips' conditions; all clips start at batch.first_block[0]. distances: of the sink, in latent frames, at
    each level from each block.
    share: this process's share of the batch.
    """

    network: Network
    config: NetworkConfig
    batch: ClipBatch
    distances: Sequence[Sequence[int]]
    share: Share = field(default_factory=Share)

    def __post_init__(self) -> None:
        network, batch = self.network, self.batch
        with torch.no_grad():
            self._text = network.embed_text(batch.text)
            conditions = network.prefill(batch.reference, batch.motion, self._text)
        self._conditions = conditions

    @property
    def num_blocks(self) -> int:
        return self.batch.features.shape[-1] // self.config.frames_per_block

    def new_cache(self) -> KVCache:
        """Return the cache of one level, with the sink and no blocks."""
        b, _, _, height, width = self.batch.motion.shape
        keys = self._conditions[0][0]
        cache = KVCache(self.config, height, width, batch=b, dtype=keys.dtype, device=keys.device)
        cache.set_sink(self._conditions)
        return cache

    def velocity(self, x: Tensor, block: int, level: int, cache: KVCache) -> Tensor:
        """Predict the velocity at x (b, c, t, h, w), the input of block number `block` at a level."""
        config, network, batch = self.config, self.network, self.batch
        index = int(batch.first_block[0]) + block
        first_frame = index * config.num_frames_per_block
        cache.start_block(index, reference_frame(first_frame, self.distances[level][block]))
        frame_span = slice(block * config.frames_per_block, (block + 1) * config.frames_per_block)
        audio, heard, motion = encode_inputs(network, batch, frame_span)
        modulation = network.embed_time(timesteps(config.schedule)[level].to(x.device).reshape(1, 1))
        reference = moved_reference(network, batch, audio, heard, frame_span)
        pose = torch.zeros_like(x) if config.pose == "zeros" else reference.expand_as(x)
        history = DetachedHistory(cache)
        output = network(x, modulation, self._text, audio, pose, first_frame, history, heard, motion)
        return to_velocity(output.float(), x, reference, config.schedule[level], config)

    def clean(self, x: Tensor, block: int, level: int, cache: KVCache) -> Tensor:
        """Return the network's clean estimate of a block from its input x at a level."""
        return x - self.config.schedule[level] * self.velocity(x, block, level, cache)

    @torch.no_grad()
    def inputs(self, exit_level: int, generator: Generator) -> list[Tensor]:
        """Return each block's input at `exit_level`, reached from noise by the sampler's steps at earlier levels."""
        config, (b, c, _, h, w) = self.config, self.batch.motion.shape
        caches = [self.new_cache() for _ in range(exit_level)]
        inputs, before = [], None
        for block in range(self.num_blocks):
            drawn = self.share.noise((b, c, config.num_frames_per_block, h, w), generator)
            noise = autoregressive(drawn, config.noise_correlation, before)
            before = noise[:, :, -1]
            x = config.trained_noise_scale * noise.to(self.batch.motion)
            for level, cache in enumerate(caches):
                velocity = self.velocity(x, block, level, cache)
                x = SAMPLERS[config.sampler](x, velocity, *config.schedule[level : level + 2])
            inputs.append(x)
        return inputs

    def outputs(self, inputs: list[Tensor], exit_level: int) -> list[Tensor]:
        """Return the clean latents of all blocks from their inputs at `exit_level`; with gradients if enabled."""
        cache = self.new_cache()
        return [self.clean(x, block, exit_level, cache) for block, x in enumerate(inputs)]
