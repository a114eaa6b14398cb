"""Stage 1, causal pretraining: `python -m training.pretrain --data runs/latents --out runs/stage1`.

Block-causal flow matching: every block of a clip is noised to a level of its own and sees the noisy blocks before it,
so that the network learns at once to denoise, to be causal, and to live with a history that is never clean.
A run that is stopped goes on from its last checkpoint as if nothing had happened, bit for bit; clips that have arrived
meanwhile join at checkpoints.
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
from avatar.denoiser import config as configs
from avatar.denoiser import model
from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.model import Network
from avatar.part import Part, load_weights
from training.batches import BatchRule, ClipBatch, batch_of
from training.clips import per_frame, predict, with_noise
from training.data import StoredClip
from training.losses import draw_distance, draw_sigmas, flow_loss
from training.run import Limits, Progress, average_into, cosine, go_on, restore

# Held-out clips and draws of noise whose loss is watched.
NUM_WATCHED = 24
WATCHED_SEED = 1 << 20


@dataclass(frozen=True)
class Recipe:
    """What decides a run, beside its data and its network.

    steps: of the whole run; the rates fall to a hundredth along half a cosine. matrix_rate: of Muon, which moves the
    layers' matrices; rate: of AdamW, which moves everything else. shift: of levels from the whole range. average: how
    much of itself the average of the weights keeps each step.
    """

    steps: int = 1300
    matrix_rate: float = 4e-3
    rate: float = 2e-3
    warmup: int = 50
    shift: float = 3.0
    average: float = 0.998
    seed: int = 0
    batches: BatchRule = field(default_factory=BatchRule)


def optimisers(network: Network, recipe: Recipe) -> dict[str, Optimizer]:
    """Muon for the matrices inside the layers (K. Jordan 2024, scaled as in arXiv 2502.16982), AdamW for the rest."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        inside = name.startswith(("blocks", "audio_injector")) and parameter.ndim == 2
        (matrices if inside else others).append(parameter)
    return {
        "muon": torch.optim.Muon(matrices, recipe.matrix_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        "adamw": torch.optim.AdamW(others, recipe.rate, (0.9, 0.98), weight_decay=0.01),
    }


class Pretraining:
    """A network, the average of its weights, and the optimisers."""

    def __init__(self, recipe: Recipe, network: Network) -> None:
        self.recipe, self.steps, self.progress = recipe, recipe.steps, Progress()
        self.network, self.config = network, network.config
        self.average = deepcopy(network).requires_grad_(False)
        self.optimisers = optimisers(network, recipe)
        self.parts: dict[str, nn.Module | Optimizer] = {
            "network": network,
            "average": self.average,
            **self.optimisers,
        }
        self._rates = {name: each.param_groups[0]["lr"] for name, each in self.optimisers.items()}

    def advance(self, clips: Sequence[StoredClip]) -> dict[str, float]:
        recipe, step = self.recipe, self.progress.step
        batch = batch_of(clips, recipe.batches, self.config, recipe.seed + 1, step)
        generator = Generator().manual_seed((recipe.seed + 1) << 32 | step)
        loss = clip_loss(self.network, self.config, batch, recipe.shift, generator).mean()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for name, optimiser in self.optimisers.items():
            for group in optimiser.param_groups:
                group["lr"] = self._rates[name] * cosine(step, recipe.steps, recipe.warmup)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.progress.step += 1
        average_into(self.average, self.network, recipe.average, self.progress.step)
        return {"loss": float(loss.detach())}

    @torch.no_grad()
    def watch(self, held_out: Sequence[StoredClip], out: Path) -> dict[str, float]:  # noqa: ARG002
        """The loss on held-out clips, always the same ones at the same levels."""
        rule = self.recipe.batches
        losses = []
        for number in range(NUM_WATCHED // rule.batch):
            batch = batch_of(held_out, rule, self.config, WATCHED_SEED, number)
            generator = Generator().manual_seed(number)
            losses.append(clip_loss(self.average, self.config, batch, self.recipe.shift, generator))
        return {"held_out_loss": float(torch.cat(losses).mean())}


def clip_loss(network: Network, config: NetworkConfig, batch: ClipBatch, shift: float, generator: Generator) -> Tensor:
    """The loss of each clip, (b,), at levels and with noise from the generator."""
    clean = batch.latents
    num_blocks = clean.shape[2] // config.num_frames_per_block
    sigmas = draw_sigmas(len(clean), num_blocks, config, shift, generator)
    noise = torch.randn(clean.shape, generator=generator)
    distance = draw_distance(config, generator)
    sigma = per_frame(sigmas, config)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = predict(network, config, with_noise(clean, noise, sigma), sigmas, batch, distance)
    return flow_loss(velocity, noise - clean, sigma, batch.weight, config)


def export(run: Pretraining, folder: Path) -> None:
    """Write the run's average as a checkpoint's denoiser folder, float16."""
    checkpoint.save(folder, run.config.to_dict(), run.average, torch.float16)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.pretrain", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of shards, as training.prepare makes it")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run: state, log, sheets")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="length of the whole run")
    parser.add_argument("--start", type=Path, help="a denoiser folder whose weights a new run begins with")
    parser.add_argument("--minutes", type=float, default=60, help="stop after this long; the next call goes on")
    parser.add_argument("--save-minutes", type=float, default=5, help="between two checkpoints")
    parser.add_argument("--export", type=Path, help="train nothing: write the run's weights to this folder")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    network = Network(configs.tiny())
    if flags.start:
        load_weights(network, Part.read(flags.start))
    else:
        model.initialise(network, Recipe.seed)
    run = Pretraining(Recipe(steps=flags.steps), network)
    if (flags.out / "state.pt").exists():
        restore(run, flags.out / "state.pt")
    if flags.export:
        export(run, flags.export)
    else:
        go_on(run, flags.data, flags.out, Limits(flags.minutes, flags.save_minutes))


if __name__ == "__main__":
    main()
