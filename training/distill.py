"""Stage 2, Self-Forcing DMD: `python -m training.distill --data DATA --start runs/stage1/denoiser --out runs/stage2`.

The generator rolls out with the product's own caches; teacher and critic look at its clips under noise, and it moves
from where the critic expects clips to where the teacher does. One level, drawn for the whole batch, has gradients, and
no gradient crosses the cache. The teacher is guided away from silence, which the generator learns without its cost.
Only conditions are taken from the data. Resumes bit for bit.

Source: Self-Forcing (arXiv 2506.08009) and Live Avatar (arXiv 2512.04677), algorithms 1 and 2.
"""

import argparse
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from avatar import checkpoint
from avatar.denoiser.model import Network, load
from avatar.denoiser.schedule import shifted
from avatar.part import Part
from training.batches import BatchRule, ClipBatch, batch_of
from training.clips import clean_of, per_frame, predict, with_noise
from training.data import StoredClip
from training.losses import dmd_gradient, draw_distance, flow_loss, moved_loss
from training.rollout import Rollout
from training.run import Limits, Progress, average_into, go_on, restore

LOWEST, HIGHEST = 0.02, 0.98


@dataclass(frozen=True)
class Recipe:
    """What decides a run, beside its data and the network that it begins with.

    steps: of the critic; the generator moves in every `ratio`th. guidance: how far the teacher is moved away from
    silence. average: how much of itself the average of the generator's weights keeps each of its steps.
    blockwise: the memory of one block's graph at a time, for one forward pass more per block.
    """

    steps: int = 400
    ratio: int = 4
    guidance: float = 0.5
    rate: float = 4e-5
    critic_rate: float = 3e-4
    betas: tuple[float, float] = (0.0, 0.99)
    shift: float = 3.0
    average: float = 0.95
    blockwise: bool = False
    seed: int = 0
    batches: BatchRule = field(default_factory=lambda: BatchRule(batch=4, num_blocks=(4, 5), silence=0.0))


class Distillation:
    """Generator, its average, critic and teacher, all of them the same network at first."""

    def __init__(self, recipe: Recipe, network: Network) -> None:
        self.recipe, self.steps, self.progress = recipe, recipe.steps, Progress()
        self.config = network.config
        self.generator = network.requires_grad_(True)
        self.average = deepcopy(network).requires_grad_(False)
        self.critic = deepcopy(network)
        self.teacher = deepcopy(network).requires_grad_(False)
        self.moves = torch.optim.AdamW(self.generator.parameters(), recipe.rate, recipe.betas, weight_decay=0.01)
        self.critic_moves = torch.optim.AdamW(
            self.critic.parameters(), recipe.critic_rate, recipe.betas, weight_decay=0.01
        )
        self.parts: dict[str, nn.Module | Optimizer] = {
            "generator": self.generator,
            "average": self.average,
            "critic": self.critic,
            "moves": self.moves,
            "critic_moves": self.critic_moves,
        }

    def advance(self, clips: Sequence[StoredClip]) -> dict[str, float]:
        recipe, step = self.recipe, self.progress.step
        draws = Generator().manual_seed((recipe.seed + 1) << 32 | step)
        batch = standing_together(batch_of(clips, recipe.batches, self.config, recipe.seed + 2, step))
        exit_level = int(torch.randint(self.config.num_levels, (), generator=draws))
        figures: dict[str, float] = {}
        if step % recipe.ratio == recipe.ratio - 1:
            figures |= self.move_generator(batch, exit_level, draws)
        figures |= self.move_critic(batch, exit_level, draws)
        self.progress.step += 1
        return figures

    def rollout(self, batch: ClipBatch, draws: Generator) -> Rollout:
        return Rollout(self.generator, self.config, batch, draw_distance(self.config, draws))

    def move_generator(self, batch: ClipBatch, exit_level: int, draws: Generator) -> dict[str, float]:
        with torch.autocast("cpu", torch.bfloat16):
            rollout = self.rollout(batch, draws)
            entered = rollout.inputs(exit_level, draws)
            with torch.set_grad_enabled(not self.recipe.blockwise):
                made = torch.cat(rollout.outputs(entered, exit_level), dim=2)
            gradient = self.direction(made.detach(), batch, draws)
            if self.recipe.blockwise:
                loss = backward_by_block(rollout, entered, exit_level, gradient)
            else:
                loss = moved_loss(made, gradient)
                torch.autograd.backward(loss)
        take(self.moves, self.generator)
        average_into(self.average, self.generator, self.recipe.average, self.progress.step // self.recipe.ratio)
        return {"generator_loss": float(loss.detach()), "gradient": float(gradient.abs().mean())}

    @torch.no_grad()
    def direction(self, made: Tensor, batch: ClipBatch, draws: Generator) -> Tensor:
        """Which way the generated clips should move, (b, c, t, h, w)."""
        sigmas, noised, _ = self.under_noise(made, draws)
        distance = draw_distance(self.config, draws)

        def clean(network: Network, batch: ClipBatch) -> Tensor:
            velocity = predict(network, self.config, noised, sigmas, batch, distance)
            return clean_of(noised, velocity, per_frame(sigmas, self.config))

        real = clean(self.teacher, batch)
        real = real + self.recipe.guidance * (real - clean(self.teacher, batch.silent()))
        return dmd_gradient(made, clean(self.critic, batch), real)

    def move_critic(self, batch: ClipBatch, exit_level: int, draws: Generator) -> dict[str, float]:
        """Teach the critic what the generator makes now."""
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                rollout = self.rollout(batch, draws)
                made = torch.cat(rollout.outputs(rollout.inputs(exit_level, draws), exit_level), dim=2)
            sigmas, noised, noise = self.under_noise(made, draws)
            velocity = predict(self.critic, self.config, noised, sigmas, batch, draw_distance(self.config, draws))
        sigma = per_frame(sigmas, self.config)
        weight = torch.ones_like(made[:, :1])
        loss = flow_loss(velocity, noise - made, sigma, weight, self.config).mean()
        torch.autograd.backward(loss)
        take(self.critic_moves, self.critic)
        return {"critic_loss": float(loss.detach())}

    def under_noise(self, made: Tensor, draws: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Levels (b, k), one for all blocks of a clip; the clips under noise; and the noise."""
        num_blocks = made.shape[2] // self.config.num_frames_per_block
        uniform = torch.rand(len(made), 1, generator=draws).expand(-1, num_blocks)
        sigmas = shifted(uniform, self.recipe.shift).clamp(LOWEST, HIGHEST).to(made)
        noise = torch.randn(made.shape, generator=draws).to(made)
        return sigmas, with_noise(made, noise, per_frame(sigmas, self.config)), noise

    def watch(self, held_out: Sequence[StoredClip], out: Path) -> dict[str, float]:  # noqa: ARG002
        return {}


def backward_by_block(rollout: Rollout, entered: list[Tensor], exit_level: int, gradient: Tensor) -> Tensor:
    """`moved_loss` of the whole rollout, and its gradients, with one block's graph in memory at a time.

    No gradient crosses the cache, so the sum over blocks is that of the whole graph.
    Source: Live Avatar (arXiv 2512.04677), algorithm 2; the direction is asked for once, not for every block.
    """
    cache = rollout.cache()
    total = torch.zeros((), device=gradient.device)
    for block, (x, part) in enumerate(zip(entered, gradient.chunk(len(entered), dim=2), strict=True)):
        with torch.enable_grad():
            loss = moved_loss(rollout.clean(x, block, exit_level, cache), part) / len(entered)
        torch.autograd.backward(loss)
        total += loss.detach()
    return total


def take(optimiser: Optimizer, network: Network) -> None:
    """A step of the optimiser."""
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def standing_together(batch: ClipBatch) -> ClipBatch:
    """The same with all clips at the place in the stream of the first: they share caches."""
    return batch.replaced(first_block=batch.first_block[:1].expand(len(batch.first_block)))


def export(run: Distillation, folder: Path) -> None:
    """Write the average of the generator's weights as a checkpoint's denoiser folder, float16."""
    checkpoint.save(folder, run.config.to_dict(), run.average, torch.float16)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.distill", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of shards, as training.prepare makes it")
    parser.add_argument("--start", type=Path, required=True, help="denoiser folder of the network of stage 1")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run: state, log, sheets")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="length of the whole run, steps of the critic")
    parser.add_argument("--guidance", type=float, default=Recipe.guidance, help="of the teacher, away from silence")
    parser.add_argument("--rate", type=float, default=Recipe.rate, help="learning rate of the generator")
    parser.add_argument("--minutes", type=float, default=60, help="stop after this long; the next call goes on")
    parser.add_argument("--save-minutes", type=float, default=5, help="between two checkpoints")
    parser.add_argument("--export", type=Path, help="train nothing: write the run's weights to this folder")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    network, _ = load(Part.read(flags.start))
    run = Distillation(Recipe(steps=flags.steps, guidance=flags.guidance, rate=flags.rate), network.train())
    if (flags.out / "state.pt").exists():
        restore(run, flags.out / "state.pt")
    if flags.export:
        export(run, flags.export)
    else:
        go_on(run, flags.data, flags.out, Limits(flags.minutes, flags.save_minutes))


if __name__ == "__main__":
    main()
