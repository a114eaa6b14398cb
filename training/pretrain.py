"""Stage 1, causal pretraining: `python -m training.pretrain --data runs/latents --out runs/stage1`.

Block-causal flow matching: every block of a clip is noised to a level of its own and sees the noisy blocks before it,
so that the network learns at once to denoise, to be causal, and to live with a history that is never clean.
A run that is stopped goes on from its last checkpoint as if nothing had happened, bit for bit; clips that have arrived
meanwhile join at checkpoints.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from avatar.checkpoints.part import Part
from avatar.denoiser import config as configs
from avatar.denoiser import model
from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.model import Network
from avatar.vae.vae import Vae
from training.batches import BatchRule, ClipBatch, Share, batch_of
from training.checkpointing import Progress
from training.clips import per_frame, predict
from training.data import StoredClip
from training.eval.previews import WATCHED_SEED, read_codec, rollout_rows
from training.loop import arguments, average_into, carry_out, chosen, cosine
from training.lora import AdapterRule, kept_in, made_trainable
from training.losses import draw_distance, draw_sigmas, flow_loss, noised_each, with_noise
from training.muon import Muon
from training.strategy import SINGLE, Strategy, join, recomputing

# Held-out clips, and draws of noise, whose loss is watched.
NUM_WATCHED = 24


@dataclass(frozen=True)
class Recipe:
    """What decides a run, beside its data and its network.

    steps: of the whole run; the rates fall to a hundredth along half a cosine. matrix_rate: of Muon, which moves the
    layers' matrices; rate: of AdamW, which moves everything else, or with matrix_rate 0 everything. audio_rate: of
    AdamW where sound enters the layers, if it is another. shift: of levels from the whole range. average: how much of
    itself the average of the weights keeps each step. noisy_motion: each motion frame has a noise level of its own.
    recompute: less memory for a second forward pass.
    """

    steps: int = 1300
    matrix_rate: float = 4e-3
    rate: float = 2e-3
    audio_rate: float | None = None
    warmup: int = 50
    shift: float = 3.0
    average: float = 0.998
    noisy_motion: bool = False
    recompute: bool = False
    adapter: AdapterRule | None = None
    seed: int = 0
    batches: BatchRule = field(default_factory=BatchRule)


def tiny() -> Recipe:
    """The embedded default's, from nothing."""
    return Recipe()


def base() -> Recipe:
    """The public 14B network's: it becomes causal by an adapter, with the frames before each clip as its history.

    Source: Live Avatar (arXiv 2512.04677) and the training configuration in its repository.
    """
    return Recipe(
        steps=25000,
        matrix_rate=0.0,
        rate=5e-5,
        audio_rate=1e-5,
        warmup=500,
        shift=5.0,
        noisy_motion=True,
        recompute=True,
        adapter=AdapterRule(),
        batches=BatchRule(batch=128, num_blocks=(7, 7), lips=1.0, silence=0.15, follow=True),
    )


PRESETS: dict[str, tuple[Callable[[], NetworkConfig], Callable[[], Recipe]]] = {
    "tiny": (configs.tiny, tiny),
    "base": (configs.base, base),
}


def optimisers(network: Network, recipe: Recipe) -> dict[str, Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the rest."""
    matrices: list[nn.Parameter] = []
    audio: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        inside = name.startswith(("blocks", "audio_injector")) and parameter.ndim == 2
        if not parameter.requires_grad:
            continue
        if inside and recipe.matrix_rate:
            matrices.append(parameter)
        elif recipe.audio_rate and name.startswith("audio_injector"):
            audio.append(parameter)
        else:
            others.append(parameter)
    groups: list[dict[str, Any]] = [{"params": others}]
    if audio:
        groups.append({"params": audio, "lr": recipe.audio_rate})
    found: dict[str, Optimizer] = {"adamw": torch.optim.AdamW(groups, recipe.rate, (0.9, 0.98), weight_decay=0.01)}
    if matrices:
        found = {"muon": Muon(matrices, recipe.matrix_rate, weight_decay=0.01), **found}
    return found


class Pretraining:
    """A network, the average of its weights, and the optimisers."""

    def __init__(
        self,
        recipe: Recipe,
        begin: Callable[[], Network],
        strategy: Strategy = SINGLE,
        codec: Vae[Any] | None = None,
    ) -> None:
        """begin: makes the network that the run begins with, anew each time. codec: for sheets.

        ValueError if the recipe's optimiser cannot work on shards.
        """
        if strategy.kind == "fsdp2" and recipe.matrix_rate:
            raise ValueError(
                "Muon looks at whole matrices, which FSDP2 has in shards: set matrix_rate to 0, or use DDP"
            )
        self.recipe, self.steps, self.strategy, self.codec = recipe, recipe.steps, strategy, codec
        self.progress = Progress()
        network = made_trainable(begin(), recipe.adapter, recipe.seed)
        self.spread = strategy.spread(recomputing(network) if recipe.recompute else network)
        average = made_trainable(begin(), recipe.adapter, recipe.seed).requires_grad_(False)
        self.average, self.config = strategy.spread(average), network.config
        self.optimisers = optimisers(self.spread.network, recipe)
        self.parts: Mapping[str, nn.Module | Optimizer] = {
            "network": self.spread.network,
            "average": self.average.network,
            **self.optimisers,
        }
        self._rates = {name: [g["lr"] for g in each.param_groups] for name, each in self.optimisers.items()}

    def advance(self, clips: Sequence[StoredClip]) -> dict[str, float]:
        recipe, step, network = self.recipe, self.progress.step, self.spread.network
        batch = batch_of(clips, recipe.batches, self.config, recipe.seed + 1, step, self.strategy.share)
        generator = Generator().manual_seed((recipe.seed + 1) << 32 | step)
        with self.strategy.autocast():
            losses = self.spread(
                clip_loss, network, batch.to(self.strategy.device), recipe, generator, self.strategy.share
            )
        loss = losses.mean()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for name, optimiser in self.optimisers.items():
            for rate, group in zip(self._rates[name], optimiser.param_groups, strict=True):
                group["lr"] = rate * cosine(step, recipe.steps, recipe.warmup)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.progress.step += 1
        average_into(self.average.network, network, recipe.average, self.progress.step)
        return {"loss": float(loss.detach())}

    @torch.no_grad()
    def watch(self, held_out: Sequence[StoredClip]) -> dict[str, float]:
        """The loss on held-out clips, always the same ones at the same levels."""
        rule, strategy = self.recipe.batches, self.strategy
        losses = []
        for number in range(max(1, NUM_WATCHED // rule.batch)):
            batch = batch_of(held_out, rule, self.config, WATCHED_SEED, number, strategy.share).to(strategy.device)
            generator = Generator().manual_seed(number)
            with strategy.autocast():
                loss = self.average(clip_loss, self.average.network, batch, self.recipe, generator, strategy.share)
            losses.append(loss)
        return {"held_out_loss": float(torch.cat(losses).mean())}

    def sheet(self, held_out: Sequence[StoredClip]) -> list[Tensor]:
        return rollout_rows(self.average, self.config, held_out, self.codec, self.strategy)


def clip_loss(network: Network, batch: ClipBatch, recipe: Recipe, generator: Generator, share: Share) -> Tensor:
    """The loss of each clip, (b,), at levels and with noise from the generator."""
    config, clean = network.config, batch.latents
    num_blocks = clean.shape[2] // config.num_frames_per_block
    sigmas = share.of(draw_sigmas(len(clean) * share.world, num_blocks, config, recipe.shift, generator)).to(clean)
    noise = share.noise(clean.shape, generator).to(clean)
    distance = draw_distance(config, generator)
    if recipe.noisy_motion:
        batch = batch.replaced(motion=noised_each(batch.motion, share, generator))
    sigma = per_frame(sigmas, config)
    velocity = predict(network, config, with_noise(clean, noise, sigma), sigmas, batch, distance)
    return flow_loss(velocity, noise - clean, sigma, batch.weight, config)


def main() -> None:
    parser = arguments("training.pretrain", __doc__ or "", steps="steps of the optimiser")
    parser.add_argument("--start", type=Path, help="a denoiser folder whose weights a new run begins with")
    flags = parser.parse_args()
    configuration, preset = PRESETS[flags.preset]
    recipe = replace(preset(), **chosen(flags, "steps", "adapter"))
    if flags.batch:
        recipe = replace(recipe, batches=replace(recipe.batches, batch=flags.batch))
    if flags.strategy == "fsdp2" or recipe.adapter:
        # Muon looks at whole matrices.
        recipe = replace(recipe, matrix_rate=0.0)
    torch.set_num_threads(1)

    def begin() -> Network:
        if flags.start:
            return model.load(Part.read(flags.start), dtype=kept_in(recipe.adapter))[0].train()
        network = Network(configuration())
        model.initialise(network, recipe.seed)
        return network

    strategy = join(flags.strategy)
    run = Pretraining(recipe, begin, strategy, read_codec(flags.vae, strategy.device))
    carry_out(run, flags)


if __name__ == "__main__":
    main()
