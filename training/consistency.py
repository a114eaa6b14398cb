"""Causal consistency distillation, between both stages:

    python -m training.consistency --data DATA --start runs/stage1/denoiser --out runs/consistency

The network learns to give, at every noise level, the clean latents at the end of the teacher's path from there, which
stage 2 then starts from. Teacher: the network of stage 1 with classifier-free guidance. A step of its causal path takes
all blocks of a clip from one level to the next, as the levels do when served; the target is the clean estimate of the
network's own EMA after that step. A stopped run resumes bit for bit.

Source: Causal-Forcing++ (arXiv 2605.15141), after consistency models (arXiv 2303.01469).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from avatar.checkpoints.part import Part
from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.model import Network, load
from avatar.denoiser.sampler import autoregressive, shifted
from avatar.denoiser.speed import compile_layers
from avatar.vae.vae import Vae
from training.batches import BatchConfig, ClipBatch, load_batch
from training.checkpointing import Progress
from training.clips import clean_estimate, frame_sigmas, predict_velocity, with_moved
from training.data import StoredClip
from training.eval.previews import load_codec, mouth_metrics, preview_rows
from training.loop import argument_parser, cosine_schedule, overrides, run_program, update_ema
from training.lora import LoraConfig, make_trainable
from training.losses import MIN_SIGMA, add_noise, draw_sink_distances, flow_matching_loss
from training.strategy import SINGLE, Strategy, WrappedNetwork, join


@dataclass(frozen=True)
class ConsistencyRecipe:
    """Configuration of a run, apart from its data and network.

    steps: of the whole run; the learning rate falls along half a cosine to a hundredth. path_steps: steps of the
    teacher's path; the served levels are on it, too. guidance: scale of the teacher's classifier-free guidance.
    ema_decay: per step, of targets and of the exported weights. is_float32: the difference between neighbouring levels
    is lost in bfloat16.
    """

    steps: int = 600
    path_steps: int = 12
    guidance: float = 0.5
    lr: float = 2e-4
    warmup: int = 20
    shift: float = 3.0
    ema_decay: float = 0.95
    is_float32: bool = True
    lora: LoraConfig | None = None
    seed: int = 0
    batches: BatchConfig = field(
        default_factory=lambda: BatchConfig(num_blocks=(3, 5), audio_dropout=0.0, heard_dropout=0.0)
    )


def tiny() -> ConsistencyRecipe:
    """Return the recipe for small networks of blocks of 3 latents."""
    return ConsistencyRecipe()


def tiny_256() -> ConsistencyRecipe:
    """Return the recipe of the embedded default."""
    recipe = ConsistencyRecipe()
    return replace(recipe, batches=replace(recipe.batches, num_blocks=(12, 12), detail_weight=0.0))


PRESETS = {"tiny": tiny, "tiny_256": tiny_256}


def path_sigmas(config: NetworkConfig, recipe: ConsistencyRecipe) -> Tensor:
    """Return the descending sigmas of the teacher's path, from the schedule's first level to 0."""
    even = shifted(torch.linspace(1, 0, recipe.path_steps + 1), recipe.shift)
    sigmas = {sigma for sigma in even.tolist() if MIN_SIGMA <= sigma < config.schedule[0]}
    return torch.tensor(sorted(sigmas | set(config.schedule), reverse=True))


class ConsistencyDistillation:
    """A run: the network, its EMA, which gives the targets and is exported, and the frozen teacher."""

    def __init__(
        self,
        recipe: ConsistencyRecipe,
        make_network: Callable[[], Network],
        strategy: Strategy = SINGLE,
        codec: Vae[Any] | None = None,
    ) -> None:
        """make_network: returns a new network with the weights of stage 1. codec: for previews."""
        self.recipe, self.steps, self.strategy, self.codec = recipe, recipe.steps, strategy, codec
        self.progress = Progress()
        self.network = strategy.wrap(make_trainable(make_network(), recipe.lora, recipe.seed))
        self.ema, self.teacher = (strategy.wrap(make_network().requires_grad_(False)) for _ in range(2))
        self.config = self.network.network.config
        self.path = path_sigmas(self.config, recipe)
        trainable = [each for each in self.network.network.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, recipe.lr, (0.9, 0.99), weight_decay=0.01)
        self.parts: Mapping[str, nn.Module | Optimizer] = {
            "network": self.network.network,
            "average": self.ema.network,
            "adamw": self.optimizer,
        }

    def advance(self, clips: Sequence[StoredClip]) -> dict[str, float]:
        recipe, step, network = self.recipe, self.progress.step, self.network.network
        random = Generator().manual_seed((recipe.seed + 1) << 32 | step)
        batch = load_batch(clips, recipe.batches, self.config, recipe.seed + 3, step, self.strategy.share)
        batch = batch.to(self.strategy.device)
        with self.strategy.autocast():
            loss = self.loss(batch, random)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr * cosine_schedule(step, recipe.steps, recipe.warmup)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        update_ema(self.ema.network, network, recipe.ema_decay, self.progress.step)
        return {"loss": float(loss.detach())}

    def loss(self, batch: ClipBatch, random: Generator) -> Tensor:
        """Return the loss of clips, each at a step of the path of its own."""
        share, clean, config = self.strategy.share, batch.latents, self.config
        if config.mover:
            batch = self.teacher(with_moved, self.teacher.network, batch)
        num_blocks = clean.shape[2] // config.num_frames_per_block
        drawn = torch.randint(len(self.path) - 1, (len(clean) * share.world, 1), generator=random)
        steps = share.of(drawn).expand(-1, num_blocks)
        sigmas, following = (self.path[each].to(clean) for each in (steps, steps + 1))
        noise = autoregressive(share.noise(clean.shape, random), config.noise_correlation).to(clean)
        distances = draw_sink_distances(config, num_blocks, random)
        sigma = frame_sigmas(sigmas, config)
        x = add_noise(clean, noise, sigma)
        target = self.target(x, sigmas, following, batch, distances)
        velocity = self._velocity(self.network, x, sigmas, batch, distances)
        return flow_matching_loss(velocity, (x - target) / sigma, sigma, batch.weight, config).mean()

    @torch.no_grad()
    def target(
        self, x: Tensor, sigmas: Tensor, following: Tensor, batch: ClipBatch, distances: Sequence[int]
    ) -> Tensor:
        """Return the clean latents that x (b, c, t, h, w) shall lead to.

        The teacher takes x from sigmas to the following ones, (b, k) each; from there the EMA estimates the clean
        latents. At a following sigma of 0, they are x itself.
        """
        velocity = self._velocity(self.teacher, x, sigmas, batch, distances)
        if self.recipe.guidance:
            without = self._velocity(self.teacher, x, sigmas, batch.unconditional(), distances)
            velocity = velocity + self.recipe.guidance * (velocity - without)
        now, after = (frame_sigmas(each, self.config) for each in (sigmas, following))
        x = x + (after - now) * velocity
        least = following.clamp(min=MIN_SIGMA)
        return clean_estimate(x, self._velocity(self.ema, x, least, batch, distances), after)

    def _velocity(
        self, network: WrappedNetwork, x: Tensor, sigmas: Tensor, batch: ClipBatch, distances: Sequence[int]
    ) -> Tensor:
        return network(predict_velocity, network.network, self.config, x, sigmas, batch, distances)

    def validate(self, held_out: Sequence[StoredClip]) -> dict[str, float]:
        """Return metrics of the mouths that the EMA generates at the served levels. Empty without a codec."""
        return mouth_metrics(self.ema, self.config, held_out, self.codec, self.strategy)

    def preview(self, held_out: Sequence[StoredClip]) -> list[Tensor]:
        return preview_rows(self.ema, self.config, held_out, self.codec, self.strategy)


def main() -> None:
    parser = argument_parser("training.consistency", __doc__ or "", "optimizer steps", [*PRESETS])
    parser.add_argument("--start", type=Path, required=True, help="denoiser folder that stage 1 exported")
    parser.add_argument("--guidance", type=float, help="scale of the teacher's classifier-free guidance")
    parser.add_argument("--rate", type=float, help="learning rate")
    parser.add_argument("--compile", action="store_true", help="compile the layers: faster after a slow start")
    flags = parser.parse_args()
    recipe = replace(PRESETS[flags.preset](), **overrides(steps=flags.steps, guidance=flags.guidance, lr=flags.rate))
    if flags.batch:
        recipe = replace(recipe, batches=replace(recipe.batches, batch_size=flags.batch))
    torch.set_num_threads(1)
    strategy = join(flags.strategy, recipe.is_float32)

    def make_network() -> Network:
        network = load(Part.read(flags.start)).train()
        if flags.compile:
            compile_layers(network)
        return network

    run = ConsistencyDistillation(recipe, make_network, strategy, load_codec(flags.vae, strategy.device))
    run_program(run, flags)


if __name__ == "__main__":
    main()
