"""Stage 2, self-forcing DMD: `python -m training.distill --data DATA --start runs/stage1/denoiser --out runs/stage2`.

The generator generates clips block by block with the product's own caches. Teacher (real score) and critic (fake score)
denoise these clips, and the generator moves from the critic's estimate towards the teacher's. One level, drawn for the
whole batch, has gradients, and no gradient crosses the cache. The teacher uses classifier-free guidance, which the
generator learns without its cost. A small flow matching loss on the data's own clips can keep it to them; else only
conditions are read from the data. A stopped run resumes bit for bit.

Source: Self-Forcing (arXiv 2506.08009) and Live Avatar (arXiv 2512.04677), algorithms 1 and 2.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from avatar.checkpoints.part import Part
from avatar.denoiser.model import Network, load
from avatar.denoiser.sampler import autoregressive, shifted
from avatar.vae.vae import Vae
from training.batches import BatchConfig, ClipBatch, load_batch
from training.checkpointing import Progress
from training.clips import clean_estimate, frame_sigmas, predict_velocity, with_moved
from training.data import StoredClip
from training.eval.previews import load_codec, mouth_metrics, preview_rows
from training.loop import argument_parser, overrides, run_program, update_ema
from training.lora import LoraConfig, make_trainable, weight_dtype
from training.losses import (
    add_noise,
    dmd_gradient,
    dmd_loss,
    draw_level_distances,
    draw_sink_distances,
    exit_levels,
    flow_matching_loss,
)
from training.self_forcing import BlockwiseGeneration
from training.strategy import SINGLE, Strategy, WrappedNetwork, checkpoint_activations, join

MIN_SCORE_SIGMA, MAX_SCORE_SIGMA = 0.02, 0.98


@dataclass(frozen=True)
class DistillRecipe:
    """Configuration of a run, apart from its data and initial networks.

    steps: of the critic; the generator takes a step in every `update_ratio`th. guidance: scale of the teacher's
    classifier-free guidance. lr: of the generator. max_grad_norm: for gradient clipping. ema_decay: per generator step.
    causal_scores: teacher and critic are causal; else they attend to the whole clip. blockwise: gradient accumulation
    over blocks, with the memory of one block's graph for one more forward pass per block. checkpoint_activations: less
    memory for a second forward pass, of critic and generator. real_weight: of the generator's flow matching loss on
    clips of the data, at the schedule's levels. is_float32: the difference of teacher and critic loses its digits in
    bfloat16.
    """

    steps: int = 400
    update_ratio: int = 4
    guidance: float = 0.5
    lr: float = 4e-5
    critic_lr: float = 3e-4
    betas: tuple[float, float] = (0.0, 0.99)
    max_grad_norm: float = 1.0
    shift: float = 3.0
    ema_decay: float = 0.95
    causal_scores: bool = True
    blockwise: bool = False
    checkpoint_activations: bool = False
    real_weight: float = 0.0
    is_float32: bool = False
    lora: LoraConfig | None = None
    seed: int = 0
    batches: BatchConfig = field(
        default_factory=lambda: BatchConfig(batch_size=4, num_blocks=(4, 5), audio_dropout=0.0, same_position=True)
    )


def tiny() -> DistillRecipe:
    """Return the recipe for small networks of blocks of 3 latents: the network of stage 1 is its own teacher."""
    return DistillRecipe()


def tiny_256() -> DistillRecipe:
    """Return the recipe of the embedded default: 100 steps of the generator."""
    batches = BatchConfig(4, (12, 12), detail_weight=0.0, audio_dropout=0.0, same_position=True)
    return DistillRecipe(steps=500, update_ratio=5, real_weight=0.25, is_float32=True, batches=batches)


def base() -> DistillRecipe:
    """Return the recipe of the public 14B network: the published bidirectional one is teacher and initial critic.

    500 steps of the generator. Source: Live Avatar (arXiv 2512.04677) and Self-Forcing (arXiv 2506.08009).
    """
    return DistillRecipe(
        steps=2500,
        update_ratio=5,
        guidance=3.0,
        lr=1e-5,
        critic_lr=2e-6,
        betas=(0.0, 0.999),
        max_grad_norm=10.0,
        shift=5.0,
        ema_decay=0.99,
        causal_scores=False,
        blockwise=True,
        checkpoint_activations=True,
        lora=LoraConfig(),
        batches=BatchConfig(batch_size=128, num_blocks=(7, 7), lips_gain=1.0, audio_dropout=0.0, same_position=True),
    )


PRESETS = {"tiny": tiny, "tiny_256": tiny_256, "base": base}


class Distillation:
    """A run of stage 2: generator, its EMA, critic and teacher, each wrapped by itself."""

    def __init__(
        self,
        recipe: DistillRecipe,
        make_generator: Callable[[], Network],
        make_teacher: Callable[[], Network] | None = None,
        strategy: Strategy = SINGLE,
        codec: Vae[Any] | None = None,
        is_offloaded: bool = False,
    ) -> None:
        """make_generator, make_teacher: return a new network with the initial weights of the generator, and of teacher
        and critic; without the latter the generator's. codec: for previews. is_offloaded: keep the teacher's shards in
        main memory.
        """
        make_teacher = make_teacher or make_generator

        def trainable(make: Callable[[], Network]) -> Network:
            network = make_trainable(make(), recipe.lora, recipe.seed)
            return checkpoint_activations(network) if recipe.checkpoint_activations else network

        self.recipe, self.steps, self.strategy, self.codec = recipe, recipe.steps, strategy, codec
        self.progress = Progress()
        self.generator = strategy.wrap(trainable(make_generator))
        self.ema = strategy.wrap(trainable(make_generator).requires_grad_(False))
        self.critic = strategy.wrap(trainable(make_teacher))
        self.teacher = strategy.wrap(make_teacher().requires_grad_(False), is_offloaded)
        self.config = self.generator.network.config
        self.optimizer = make_optimizer(self.generator.network, recipe.lr, recipe.betas)
        self.critic_optimizer = make_optimizer(self.critic.network, recipe.critic_lr, recipe.betas)
        # The names in checkpoints.
        self.parts: Mapping[str, nn.Module | Optimizer] = {
            "generator": self.generator.network,
            "average": self.ema.network,
            "critic": self.critic.network,
            "moves": self.optimizer,
            "critic_moves": self.critic_optimizer,
        }

    def advance(self, clips: Sequence[StoredClip]) -> dict[str, float]:
        recipe, step = self.recipe, self.progress.step
        random = Generator().manual_seed((recipe.seed + 1) << 32 | step)
        batch = load_batch(clips, recipe.batches, self.config, recipe.seed + 2, step, self.strategy.share)
        batch = batch.to(self.strategy.device)
        if self.config.mover:
            batch = self.teacher(with_moved, self.teacher.network, batch)
        exit_level = self.draw_exit_level(random)
        metrics: dict[str, float] = {}
        if step % recipe.update_ratio == recipe.update_ratio - 1:
            metrics |= self.train_generator(batch, exit_level, random)
        metrics |= self.train_critic(batch, exit_level, random)
        self.progress.step += 1
        return metrics

    def draw_exit_level(self, random: Generator) -> int:
        """Draw the level whose clean estimates are the output: one for all blocks, clips and processes."""
        levels = exit_levels(self.config)
        return levels[int(torch.randint(len(levels), (), generator=random))]

    @torch.no_grad()
    def generate_inputs(
        self, batch: ClipBatch, exit_level: int, random: Generator
    ) -> tuple[BlockwiseGeneration, list[Tensor]]:
        """Generate clips up to the exit level: return the generation and its blocks' inputs there."""
        network, num_blocks = self.generator.network, batch.latents.shape[2] // self.config.num_frames_per_block
        distances = draw_level_distances(self.config, num_blocks, random)
        generation = self.generator(BlockwiseGeneration, network, self.config, batch, distances, self.strategy.share)
        return generation, self.generator(generation.inputs, exit_level, random)

    def train_generator(self, batch: ClipBatch, exit_level: int, random: Generator) -> dict[str, float]:
        """Take an optimizer step of the generator with the DMD loss, and a share of the loss on clips of the data."""
        generator = self.generator
        metrics: dict[str, float] = {}
        with self.strategy.autocast():
            if self.recipe.real_weight:
                with generator.accumulate_gradients(is_last=False):
                    real_loss = self.real_loss(batch, random)
                    torch.autograd.backward(self.recipe.real_weight * real_loss)
                metrics["real_loss"] = float(real_loss.detach())
            generation, inputs = self.generate_inputs(batch, exit_level, random)
            with torch.set_grad_enabled(not self.recipe.blockwise):
                generated = torch.cat(generator(generation.outputs, inputs, exit_level), dim=2)
            gradient = self.generator_gradient(generated.detach(), batch, random)
            if self.recipe.blockwise:
                loss = accumulate_blockwise(generator, generation, inputs, exit_level, gradient, batch.weight)
            else:
                loss = dmd_loss(generated, gradient, batch.weight)
                torch.autograd.backward(loss)
        self.optimizer_step(self.optimizer, generator)
        number = self.progress.step // self.recipe.update_ratio
        update_ema(self.ema.network, generator.network, self.recipe.ema_decay, number)
        return {**metrics, "generator_loss": float(loss.detach()), "gradient": float(gradient.abs().mean())}

    def real_loss(self, batch: ClipBatch, random: Generator) -> Tensor:
        """Return the generator's flow matching loss on clips of the data, each at one level of the schedule."""
        config, share, clean = self.config, self.strategy.share, batch.latents
        num_blocks = clean.shape[2] // config.num_frames_per_block
        levels = torch.randint(config.num_levels, (len(clean) * share.world, 1), generator=random)
        sigmas = torch.tensor(config.schedule)[share.of(levels)].expand(-1, num_blocks).to(clean)
        noise = autoregressive(share.noise(clean.shape, random), config.noise_correlation).to(clean)
        distances = draw_sink_distances(config, num_blocks, random)
        sigma = frame_sigmas(sigmas, config)
        noisy, generator = add_noise(clean, noise, sigma), self.generator
        velocity = generator(predict_velocity, generator.network, config, noisy, sigmas, batch, distances)
        return flow_matching_loss(velocity, noise - clean, sigma, batch.weight, config).mean()

    @torch.no_grad()
    def generator_gradient(self, generated: Tensor, batch: ClipBatch, random: Generator) -> Tensor:
        """Return the DMD gradient for generated clips, (b, c, t, h, w)."""
        sigmas, noisy, _ = self.noise_clips(generated, random)
        distances = draw_sink_distances(self.config, sigmas.shape[1], random)

        def clean(score: WrappedNetwork, batch: ClipBatch) -> Tensor:
            velocity = self.score_velocity(score, noisy, sigmas, batch, distances)
            return clean_estimate(noisy, velocity, frame_sigmas(sigmas, self.config))

        real = clean(self.teacher, batch)
        real = real + self.recipe.guidance * (real - clean(self.teacher, batch.unconditional()))
        return dmd_gradient(generated, clean(self.critic, batch), real)

    def score_velocity(
        self, score: WrappedNetwork, noisy: Tensor, sigmas: Tensor, batch: ClipBatch, distances: Sequence[int]
    ) -> Tensor:
        """Predict the velocity at noisy clips with teacher or critic."""
        causal = self.recipe.causal_scores
        return score(predict_velocity, score.network, self.config, noisy, sigmas, batch, distances, causal)

    def train_critic(self, batch: ClipBatch, exit_level: int, random: Generator) -> dict[str, float]:
        """Take an optimizer step of the critic with the flow matching loss on newly generated clips."""
        with self.strategy.autocast():
            generation, inputs = self.generate_inputs(batch, exit_level, random)
            with torch.no_grad():
                generated = torch.cat(self.generator(generation.outputs, inputs, exit_level), dim=2)
            sigmas, noisy, noise = self.noise_clips(generated, random)
            distances = draw_sink_distances(self.config, sigmas.shape[1], random)
            velocity = self.score_velocity(self.critic, noisy, sigmas, batch, distances)
        sigma = frame_sigmas(sigmas, self.config)
        loss = flow_matching_loss(velocity, noise - generated, sigma, batch.weight, self.config).mean()
        torch.autograd.backward(loss)
        self.optimizer_step(self.critic_optimizer, self.critic)
        return {"critic_loss": float(loss.detach())}

    def noise_clips(self, generated: Tensor, random: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Noise generated clips: return sigmas (b, k), one per clip repeated for its blocks; noisy clips; the noise."""
        num_blocks, share = generated.shape[2] // self.config.num_frames_per_block, self.strategy.share
        uniform = share.of(torch.rand(len(generated) * share.world, 1, generator=random)).expand(-1, num_blocks)
        sigmas = shifted(uniform, self.recipe.shift).clamp(MIN_SCORE_SIGMA, MAX_SCORE_SIGMA).to(generated)
        noise = autoregressive(share.noise(generated.shape, random), self.config.noise_correlation).to(generated)
        return sigmas, add_noise(generated, noise, frame_sigmas(sigmas, self.config)), noise

    def optimizer_step(self, optimizer: Optimizer, wrapped: WrappedNetwork) -> None:
        nn.utils.clip_grad_norm_(wrapped.network.parameters(), self.recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def validate(self, held_out: Sequence[StoredClip]) -> dict[str, float]:
        """Return metrics of the mouths that the EMA generates; there is no validation loss. Empty without a codec."""
        return mouth_metrics(self.ema, self.config, held_out, self.codec, self.strategy)

    def preview(self, held_out: Sequence[StoredClip]) -> list[Tensor]:
        return preview_rows(self.ema, self.config, held_out, self.codec, self.strategy)


def make_optimizer(network: Network, lr: float, betas: tuple[float, float]) -> Optimizer:
    trainable = [each for each in network.parameters() if each.requires_grad]
    return torch.optim.AdamW(trainable, lr, betas, weight_decay=0.01)


def accumulate_blockwise(
    generator: WrappedNetwork,
    generation: BlockwiseGeneration,
    inputs: list[Tensor],
    exit_level: int,
    gradient: Tensor,
    weight: Tensor,
) -> Tensor:
    """Return `dmd_loss` of all blocks and accumulate its gradients, with one block's graph in memory at a time.

    No gradient crosses the cache, so the sum of the blocks' gradients is that of the whole graph.
    Source: Live Avatar (arXiv 2512.04677), algorithm 2; here the DMD gradient is computed once, not for each block.
    """
    cache = generation.new_cache()
    total = torch.zeros((), device=gradient.device)
    parts = zip(inputs, *(whole.chunk(len(inputs), dim=2) for whole in (gradient, weight)), strict=True)
    for block, (x, part, weights) in enumerate(parts):
        with torch.enable_grad(), generator.accumulate_gradients(is_last=block == len(inputs) - 1):
            generated = generator(generation.clean, x, block, exit_level, cache)
            loss = dmd_loss(generated, part, weights) / len(inputs)
            torch.autograd.backward(loss)
        total += loss.detach()
    return total


def main() -> None:
    parser = argument_parser("training.distill", __doc__ or "", steps="optimizer steps of the critic")
    parser.add_argument("--start", type=Path, required=True, help="denoiser folder that stage 1 exported")
    parser.add_argument("--teacher", type=Path, help="denoiser folder of teacher and critic (default: --start)")
    parser.add_argument("--guidance", type=float, help="scale of the teacher's classifier-free guidance")
    parser.add_argument("--rate", type=float, help="learning rate of the generator")
    parser.add_argument("--offload", action="store_true", help="with fsdp2, keep the teacher in main memory")
    flags = parser.parse_args()
    changes = overrides(steps=flags.steps, lora=flags.adapter, guidance=flags.guidance, lr=flags.rate)
    recipe = replace(PRESETS[flags.preset](), **changes)
    if flags.batch:
        recipe = replace(recipe, batches=replace(recipe.batches, batch_size=flags.batch))
    torch.set_num_threads(1)
    strategy = join(flags.strategy, recipe.is_float32)

    def read_network(folder: Path) -> Network:
        return load(Part.read(folder), dtype=weight_dtype(recipe.lora)).train()

    make_generator = partial(read_network, flags.start)
    make_teacher = partial(read_network, flags.teacher or flags.start)
    codec = load_codec(flags.vae, strategy.device)
    run_program(Distillation(recipe, make_generator, make_teacher, strategy, codec, flags.offload), flags)


if __name__ == "__main__":
    main()
