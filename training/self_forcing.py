"""The network on its own: block after block from noise, each conditioned on what it made before.

The caches are the product's, one per level, so a network is trained on what it will meet when it serves: a history at
its own noise level, cut off from gradients, and a sink that stands where serving puts it.

Axes: b batch, c channels, t latent frames, h w of latents.
"""

from dataclasses import dataclass, field

import torch
from einops import repeat
from torch import Generator, Tensor

from avatar.denoiser.attention import reference_frame
from avatar.denoiser.cache import KeysValues, KVCache
from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.denoiser import velocity_of
from avatar.denoiser.model import Network
from avatar.denoiser.sampler import SAMPLERS
from avatar.denoiser.schedule import timesteps
from training.batches import ClipBatch, Share


class StepHistory:
    """A cache as one block's history while that block has gradients: they reach its own keys and values and no others.

    Source: Self-Forcing (arXiv 2506.08009) cuts the cache off in the same way.
    """

    visible = None

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache

    def extend(self, layer: int, k: Tensor, v: Tensor) -> KeysValues:
        keys, values = self._cache.extend(layer, k.detach(), v.detach())
        if not k.requires_grad:
            return keys, values
        own = self._cache.current
        # Copies, since later blocks write into the cache while this graph still needs it.
        return (
            torch.cat([keys[:, : own.start], k, keys[:, own.stop :]], dim=1),
            torch.cat([values[:, : own.start], v, values[:, own.stop :]], dim=1),
        )


@dataclass(eq=False)
class Rollout:
    """A batch of streams in the making.

    batch: what they are made under; all stand at batch.first_block[0]. distance: of the sink. share: the batch's, of
    the clips of all processes.
    """

    network: Network
    config: NetworkConfig
    batch: ClipBatch
    distance: int
    share: Share = field(default_factory=Share)

    def __post_init__(self) -> None:
        network, batch, config = self.network, self.batch, self.config
        with torch.no_grad():
            self._text = network.embed_text(batch.text)
            conditions = network.prefill(batch.reference, batch.motion, self._text)
        self._conditions = conditions
        pose = repeat(batch.reference, "b c 1 h w -> b c t h w", t=config.num_frames_per_block)
        self._pose = torch.zeros_like(pose) if config.pose == "zeros" else pose

    @property
    def num_blocks(self) -> int:
        return self.batch.features.shape[-1] // self.config.frames_per_block

    def cache(self) -> KVCache:
        """An empty history of one level."""
        b, _, _, height, width = self.batch.motion.shape
        keys = self._conditions[0][0]
        cache = KVCache(self.config, height, width, batch=b, dtype=keys.dtype, device=keys.device)
        cache.set_sink(self._conditions)
        return cache

    def velocity(self, x: Tensor, block: int, level: int, cache: KVCache) -> Tensor:
        """The velocity at x (b, c, t, h, w), block `block` of the rollout as it enters a level."""
        config, network, batch = self.config, self.network, self.batch
        index = int(batch.first_block[0]) + block
        first_frame = index * config.num_frames_per_block
        cache.begin(index, reference_frame(first_frame, self.distance))
        heard = slice(block * config.frames_per_block, (block + 1) * config.frames_per_block)
        audio = network.encode_audio(batch.features[..., heard])
        modulation = network.embed_time(timesteps(config.schedule)[level].to(x.device).reshape(1, 1))
        output = network(x, modulation, self._text, audio, self._pose, first_frame, StepHistory(cache))
        return velocity_of(output.float(), x, batch.reference, config.schedule[level], config)

    def clean(self, x: Tensor, block: int, level: int, cache: KVCache) -> Tensor:
        """The clean latents that the network sees in x at a level."""
        return x - self.config.schedule[level] * self.velocity(x, block, level, cache)

    @torch.no_grad()
    def inputs(self, exit_level: int, generator: Generator) -> list[Tensor]:
        """What every block is when it enters `exit_level`; the levels before it are taken as serving takes them."""
        config, (b, c, _, h, w) = self.config, self.batch.motion.shape
        caches = [self.cache() for _ in range(exit_level)]
        entered = []
        for block in range(self.num_blocks):
            drawn = self.share.noise((b, c, config.num_frames_per_block, h, w), generator)
            x = config.noise_scale * drawn.to(self.batch.motion)
            for level, cache in enumerate(caches):
                velocity = self.velocity(x, block, level, cache)
                x = SAMPLERS[config.sampler](x, velocity, *config.schedule[level : level + 2])
            entered.append(x)
        return entered

    def outputs(self, entered: list[Tensor], exit_level: int) -> list[Tensor]:
        """The clean latents of every block, from what entered `exit_level`; with gradients if they are enabled."""
        cache = self.cache()
        return [self.clean(x, block, exit_level, cache) for block, x in enumerate(entered)]
