"""Stage 2, Self-Forcing DMD: `python -m training.distill --data DATA --start runs/stage1/denoiser --out runs/stage2`.

The generator rolls out with the product's own caches; teacher and critic look at its clips under noise, and it moves
from where the critic expects clips to where the teacher does. One level, drawn for the whole batch, has gradients, and
no gradient crosses the cache. The teacher is guided away from silence, which the generator learns without its cost.
Only conditions are taken from the data. Resumes bit for bit.

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
from avatar.denoiser.schedule import shifted
from avatar.vae.vae import Vae
from training.batches import BatchRule, ClipBatch, batch_of
from training.checkpointing import Progress
from training.clips import clean_of, per_frame, predict
from training.data import StoredClip
from training.eval.previews import read_codec, rollout_rows
from training.loop import arguments, average_into, carry_out, chosen
from training.lora import AdapterRule, kept_in, made_trainable
from training.losses import dmd_gradient, draw_distance, flow_loss, moved_loss, with_noise
from training.self_forcing import Rollout
from training.strategy import SINGLE, Spread, Strategy, join, recomputing

LOWEST, HIGHEST = 0.02, 0.98


@dataclass(frozen=True)
class Recipe:
    """What decides a run, beside its data and the network that it begins with.

    steps: of the critic; the generator moves in every `ratio`th. guidance: how far the teacher is moved away from
    silence. largest: norm at which gradients are cut off. average: how much of itself the average of the generator's
    weights keeps each of its steps. causal_scores: teacher and critic see what the generator sees; otherwise all of a
    clip. blockwise: the memory of one block's graph at a time, for one forward pass more per block. recompute: less
    memory for a second forward pass, of critic and generator.
    """

    steps: int = 400
    ratio: int = 4
    guidance: float = 0.5
    rate: float = 4e-5
    critic_rate: float = 3e-4
    betas: tuple[float, float] = (0.0, 0.99)
    largest: float = 1.0
    shift: float = 3.0
    average: float = 0.95
    causal_scores: bool = True
    blockwise: bool = False
    recompute: bool = False
    adapter: AdapterRule | None = None
    seed: int = 0
    batches: BatchRule = field(
        default_factory=lambda: BatchRule(batch=4, num_blocks=(4, 5), silence=0.0, together=True)
    )


def tiny() -> Recipe:
    """The embedded default's: the network of stage 1 is its own teacher."""
    return Recipe()


def base() -> Recipe:
    """The public 14B network's: as it was published, bidirectional, it is the teacher, and the critic at first.

    500 steps of the generator. Source: Live Avatar (arXiv 2512.04677) and Self-Forcing (arXiv 2506.08009).
    """
    return Recipe(
        steps=2500,
        ratio=5,
        guidance=3.0,
        rate=1e-5,
        critic_rate=2e-6,
        betas=(0.0, 0.999),
        largest=10.0,
        shift=5.0,
        average=0.99,
        causal_scores=False,
        blockwise=True,
        recompute=True,
        adapter=AdapterRule(),
        batches=BatchRule(batch=128, num_blocks=(7, 7), silence=0.0, together=True),
    )


PRESETS = {"tiny": tiny, "base": base}


class Distillation:
    """Generator, its average, critic and teacher, each spread for itself."""

    def __init__(
        self,
        recipe: Recipe,
        begin: Callable[[], Network],
        teach: Callable[[], Network] | None = None,
        strategy: Strategy = SINGLE,
        codec: Vae[Any] | None = None,
        is_offloaded: bool = False,
    ) -> None:
        """begin, teach: make the networks that the generator, and that teacher and critic begin with, anew each time;
        one for all if there is no other. codec: for sheets. is_offloaded: the teacher's shards wait in main memory.
        """
        teach = teach or begin

        def trainable(make: Callable[[], Network]) -> Network:
            network = made_trainable(make(), recipe.adapter, recipe.seed)
            return recomputing(network) if recipe.recompute else network

        self.recipe, self.steps, self.strategy, self.codec = recipe, recipe.steps, strategy, codec
        self.progress = Progress()
        self.generator = strategy.spread(trainable(begin))
        self.average = strategy.spread(trainable(begin).requires_grad_(False))
        self.critic = strategy.spread(trainable(teach))
        self.teacher = strategy.spread(teach().requires_grad_(False), is_offloaded)
        self.config = self.generator.network.config
        self.moves = adamw(self.generator.network, recipe.rate, recipe.betas)
        self.critic_moves = adamw(self.critic.network, recipe.critic_rate, recipe.betas)
        self.parts: Mapping[str, nn.Module | Optimizer] = {
            "generator": self.generator.network,
            "average": self.average.network,
            "critic": self.critic.network,
            "moves": self.moves,
            "critic_moves": self.critic_moves,
        }

    def advance(self, clips: Sequence[StoredClip]) -> dict[str, float]:
        recipe, step = self.recipe, self.progress.step
        draws = Generator().manual_seed((recipe.seed + 1) << 32 | step)
        batch = batch_of(clips, recipe.batches, self.config, recipe.seed + 2, step, self.strategy.share)
        batch = batch.to(self.strategy.device)
        exit_level = self.exit_level(draws)
        figures: dict[str, float] = {}
        if step % recipe.ratio == recipe.ratio - 1:
            figures |= self.move_generator(batch, exit_level, draws)
        figures |= self.move_critic(batch, exit_level, draws)
        self.progress.step += 1
        return figures

    def exit_level(self, draws: Generator) -> int:
        """The level whose outputs are taken: one for all blocks, clips and processes, which have the same seed."""
        return int(torch.randint(self.config.num_levels, (), generator=draws))

    @torch.no_grad()
    def rolled_out(self, batch: ClipBatch, exit_level: int, draws: Generator) -> tuple[Rollout, list[Tensor]]:
        """A rollout, and what enters its exit level."""
        distance, network = draw_distance(self.config, draws), self.generator.network
        rollout = self.generator(Rollout, network, self.config, batch, distance, self.strategy.share)
        return rollout, self.generator(rollout.inputs, exit_level, draws)

    def move_generator(self, batch: ClipBatch, exit_level: int, draws: Generator) -> dict[str, float]:
        generator = self.generator
        with self.strategy.autocast():
            rollout, entered = self.rolled_out(batch, exit_level, draws)
            with torch.set_grad_enabled(not self.recipe.blockwise):
                made = torch.cat(generator(rollout.outputs, entered, exit_level), dim=2)
            gradient = self.direction(made.detach(), batch, draws)
            if self.recipe.blockwise:
                loss = backward_by_block(generator, rollout, entered, exit_level, gradient)
            else:
                loss = moved_loss(made, gradient)
                torch.autograd.backward(loss)
        self.take(self.moves, generator)
        number = self.progress.step // self.recipe.ratio
        average_into(self.average.network, generator.network, self.recipe.average, number)
        return {"generator_loss": float(loss.detach()), "gradient": float(gradient.abs().mean())}

    @torch.no_grad()
    def direction(self, made: Tensor, batch: ClipBatch, draws: Generator) -> Tensor:
        """Which way the generated clips should move, (b, c, t, h, w)."""
        sigmas, noised, _ = self.under_noise(made, draws)
        distance = draw_distance(self.config, draws)

        def clean(score: Spread, batch: ClipBatch) -> Tensor:
            velocity = self.score(score, noised, sigmas, batch, distance)
            return clean_of(noised, velocity, per_frame(sigmas, self.config))

        real = clean(self.teacher, batch)
        real = real + self.recipe.guidance * (real - clean(self.teacher, batch.silent()))
        return dmd_gradient(made, clean(self.critic, batch), real)

    def score(self, score: Spread, noised: Tensor, sigmas: Tensor, batch: ClipBatch, distance: int) -> Tensor:
        """What teacher or critic sees in clips under noise: the velocity."""
        causal = self.recipe.causal_scores
        return score(predict, score.network, self.config, noised, sigmas, batch, distance, causal)

    def move_critic(self, batch: ClipBatch, exit_level: int, draws: Generator) -> dict[str, float]:
        """Teach the critic what the generator makes now."""
        with self.strategy.autocast():
            rollout, entered = self.rolled_out(batch, exit_level, draws)
            with torch.no_grad():
                made = torch.cat(self.generator(rollout.outputs, entered, exit_level), dim=2)
            sigmas, noised, noise = self.under_noise(made, draws)
            velocity = self.score(self.critic, noised, sigmas, batch, draw_distance(self.config, draws))
        sigma = per_frame(sigmas, self.config)
        weight = torch.ones_like(made[:, :1])
        loss = flow_loss(velocity, noise - made, sigma, weight, self.config).mean()
        torch.autograd.backward(loss)
        self.take(self.critic_moves, self.critic)
        return {"critic_loss": float(loss.detach())}

    def under_noise(self, made: Tensor, draws: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Levels (b, k), one for all blocks of a clip; the clips under noise; and the noise."""
        num_blocks, share = made.shape[2] // self.config.num_frames_per_block, self.strategy.share
        uniform = share.of(torch.rand(len(made) * share.world, 1, generator=draws)).expand(-1, num_blocks)
        sigmas = shifted(uniform, self.recipe.shift).clamp(LOWEST, HIGHEST).to(made)
        noise = share.noise(made.shape, draws).to(made)
        return sigmas, with_noise(made, noise, per_frame(sigmas, self.config)), noise

    def take(self, optimiser: Optimizer, spread: Spread) -> None:
        """A step of the optimiser."""
        nn.utils.clip_grad_norm_(spread.network.parameters(), self.recipe.largest)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    def watch(self, held_out: Sequence[StoredClip]) -> dict[str, float]:  # noqa: ARG002
        return {}

    def sheet(self, held_out: Sequence[StoredClip]) -> list[Tensor]:
        return rollout_rows(self.average, self.config, held_out, self.codec, self.strategy)


def adamw(network: Network, rate: float, betas: tuple[float, float]) -> Optimizer:
    trained = [each for each in network.parameters() if each.requires_grad]
    return torch.optim.AdamW(trained, rate, betas, weight_decay=0.01)


def backward_by_block(
    generator: Spread, rollout: Rollout, entered: list[Tensor], exit_level: int, gradient: Tensor
) -> Tensor:
    """`moved_loss` of the whole rollout, and its gradients, with one block's graph in memory at a time.

    No gradient crosses the cache, so the sum over blocks is that of the whole graph.
    Source: Live Avatar (arXiv 2512.04677), algorithm 2; the direction is asked for once, not for every block.
    """
    cache = rollout.cache()
    total = torch.zeros((), device=gradient.device)
    for block, (x, part) in enumerate(zip(entered, gradient.chunk(len(entered), dim=2), strict=True)):
        with torch.enable_grad(), generator.accumulating(is_last=block == len(entered) - 1):
            made = generator(rollout.clean, x, block, exit_level, cache)
            loss = moved_loss(made, part) / len(entered)
            torch.autograd.backward(loss)
        total += loss.detach()
    return total


def main() -> None:
    parser = arguments("training.distill", __doc__ or "", steps="steps of the critic")
    parser.add_argument("--start", type=Path, required=True, help="denoiser folder of the network of stage 1")
    parser.add_argument("--teacher", type=Path, help="denoiser folder of teacher and critic, if not that of --start")
    parser.add_argument("--guidance", type=float, help="of the teacher, away from silence")
    parser.add_argument("--rate", type=float, help="learning rate of the generator")
    parser.add_argument("--offload", action="store_true", help="under fsdp2 the teacher waits in main memory")
    flags = parser.parse_args()
    recipe = replace(PRESETS[flags.preset](), **chosen(flags, "steps", "adapter", "guidance", "rate"))
    if flags.batch:
        recipe = replace(recipe, batches=replace(recipe.batches, batch=flags.batch))
    torch.set_num_threads(1)
    strategy = join(flags.strategy)

    def from_folder(folder: Path) -> Network:
        return load(Part.read(folder), dtype=kept_in(recipe.adapter))[0].train()

    begin, teach = partial(from_folder, flags.start), partial(from_folder, flags.teacher or flags.start)
    run = Distillation(recipe, begin, teach, strategy, read_codec(flags.vae, strategy.device), flags.offload)
    carry_out(run, flags)


if __name__ == "__main__":
    main()
