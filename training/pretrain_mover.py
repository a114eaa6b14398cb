"""Pretrain the mover before stage 1: `python -m training.pretrain_mover --start runs/audio --out runs/mover ...`.

The mover learns to give the clean latents from the reference, speech and face motion alone. The other weights stay, the
audio encoders' too: it would learn to silence them. Stage 1 then starts from it with `--start runs/mover/denoiser`; by
itself it would learn where the head is, and how the mouth opens, at a tenth of the speed.
A stopped run resumes bit for bit.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from avatar.checkpoints.part import Part
from avatar.denoiser.model import Network, load
from avatar.vae.vae import Vae
from training.batches import BatchConfig, ClipBatch, load_batch
from training.checkpointing import Progress
from training.clips import encode_inputs, moved_reference
from training.data import StoredClip
from training.eval.previews import VALIDATION_SEED, decode_frames, load_codec
from training.loop import argument_parser, cosine_schedule, overrides, run_program, update_ema
from training.lora import LoraConfig
from training.muon import Muon
from training.strategy import SINGLE, Strategy, join

# Held-out clips that are measured, and those of a preview.
NUM_VALIDATION_CLIPS, NUM_PREVIEW_CLIPS = 24, 3


@dataclass(frozen=True)
class MoverRecipe:
    """Configuration of a run, apart from its data and network.

    steps: of the whole run; learning rates fall along half a cosine to a hundredth. muon_lr: of Muon, for convolutions
    and maps. lr: of AdamW, for the other weights. audio_lr: of those that read audio tokens, a thousand each. batches:
    many people and few latents of each.
    """

    steps: int = 3000
    muon_lr: float = 6e-3
    lr: float = 2e-3
    audio_lr: float = 2e-4
    warmup: int = 100
    ema_decay: float = 0.99
    lora: LoraConfig | None = None
    seed: int = 0
    batches: BatchConfig = field(default_factory=lambda: BatchConfig(batch_size=24, num_blocks=(3, 3)))


def make_optimizers(network: Network, recipe: MoverRecipe) -> dict[str, Optimizer]:
    """Return Muon for the mover's convolutions and maps, and AdamW for its other weights, by checkpoint name."""
    kernels: list[nn.Parameter] = []
    groups: dict[float, list[nn.Parameter]] = {recipe.lr: [], recipe.audio_lr: []}
    for name, weight in network.mover.named_parameters():
        if weight.ndim > 2 and not name.startswith("last"):
            kernels.append(weight)
        else:
            groups[recipe.audio_lr if name.startswith(("audio.", "heard.")) else recipe.lr].append(weight)
    adamw = [{"params": each, "lr": lr} for lr, each in groups.items()]
    return {
        "muon": Muon(kernels, recipe.muon_lr, weight_decay=0.01),
        "adamw": torch.optim.AdamW(adamw, betas=(0.9, 0.98), weight_decay=0.01),
    }


class MoverPretraining:
    """A run: the network, of which the mover is trained, and its EMA."""

    def __init__(
        self,
        recipe: MoverRecipe,
        make_network: Callable[[], Network],
        strategy: Strategy = SINGLE,
        codec: Vae[Any] | None = None,
    ) -> None:
        """codec: for previews. ValueError if the network has no mover."""
        self.recipe, self.steps, self.strategy, self.codec = recipe, recipe.steps, strategy, codec
        self.progress = Progress()
        network = make_network()
        if not network.config.num_warps:
            raise ValueError("the network has no mover: its num_warps is 0")
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name.startswith("mover."))
        self.network = strategy.wrap(network)
        self.ema = strategy.wrap(make_network().requires_grad_(False))
        self.config = network.config
        self.optimizers = make_optimizers(network, recipe)
        self.parts: Mapping[str, nn.Module | Optimizer] = {
            "network": self.network.network,
            "average": self.ema.network,
            **self.optimizers,
        }
        self._base_lrs = {name: [g["lr"] for g in each.param_groups] for name, each in self.optimizers.items()}

    def advance(self, clips: Sequence[StoredClip]) -> dict[str, float]:
        recipe, step, network = self.recipe, self.progress.step, self.network.network
        batch = load_batch(clips, recipe.batches, self.config, recipe.seed + 5, step, self.strategy.share)
        batch = batch.to(self.strategy.device)
        with self.strategy.autocast():
            moved = self.network(move, network, batch)
        loss = ((moved - batch.latents) ** 2 * batch.weight).mean()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        factor = cosine_schedule(step, recipe.steps, recipe.warmup)
        for name, optimizer in self.optimizers.items():
            for lr, group in zip(self._base_lrs[name], optimizer.param_groups, strict=True):
                group["lr"] = lr * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        update_ema(self.ema.network, network, recipe.ema_decay, self.progress.step)
        return {"loss": float(loss.detach())}

    @torch.no_grad()
    def validate(self, held_out: Sequence[StoredClip]) -> dict[str, float]:
        """Return the share of held-out clips' motion that the EMA explains, and by how much less with another's input.

        The share is R^2 about each clip's mean.
        """
        batches = replace(
            self.recipe.batches,
            batch_size=self.strategy.share.world * max(2, NUM_VALIDATION_CLIPS // self.strategy.share.world),
            num_blocks=(12 // self.config.num_frames_per_block,) * 2,
            audio_dropout=0.0,
            heard_dropout=0.0,
            face_motion_dropout=0.0,
        )
        batch = load_batch(held_out, batches, self.config, VALIDATION_SEED, 0, self.strategy.share)
        batch = batch.to(self.strategy.device)

        def explained(given: ClipBatch) -> float:
            with self.strategy.autocast():
                moved = self.ema(move, self.ema.network, given)
            error, motion = moved - batch.latents, batch.latents - batch.latents.mean(2, keepdim=True)
            return 1 - float((error**2 * batch.weight).sum() / (motion**2 * batch.weight).sum())

        share = explained(batch)
        names = ("features", *self.config.inputs)
        return {"explained": share, **{f"{name}_gain": share - explained(batch.swapped(name)) for name in names}}

    @torch.no_grad()
    def preview(self, held_out: Sequence[StoredClip]) -> list[Tensor]:
        """Return rows of frames (n, 3, h, w): held-out clips, and below each its moved reference."""
        if self.codec is None:
            return []
        batches = BatchConfig(NUM_PREVIEW_CLIPS, (12 // self.config.num_frames_per_block,) * 2)
        batches = replace(batches, audio_dropout=0.0, heard_dropout=0.0, face_motion_dropout=0.0)
        batch = load_batch(held_out, batches, self.config, VALIDATION_SEED, 0).to(self.strategy.device)
        with self.strategy.autocast():
            moved = self.ema(move, self.ema.network, batch)
        pairs = zip(*(decode_frames(each, batch.reference, self.codec) for each in (batch.latents, moved)), strict=True)
        return [row[::8] for pair in pairs for row in pair]


def move(network: Network, batch: ClipBatch) -> Tensor:
    """Return the references of clips as a network moves them, (b, c, t, h, w)."""
    audio, heard, _ = encode_inputs(network, batch)
    return moved_reference(network, batch, audio, heard)


def main() -> None:
    parser = argument_parser("training.pretrain_mover", __doc__ or "", steps="optimizer steps", presets=("tiny_256",))
    parser.add_argument("--start", type=Path, required=True, help="denoiser folder that training.pretrain_audio wrote")
    flags = parser.parse_args()
    recipe = replace(MoverRecipe(), **overrides(steps=flags.steps))
    if flags.batch:
        recipe = replace(recipe, batches=replace(recipe.batches, batch_size=flags.batch))
    torch.set_num_threads(1)
    strategy = join(flags.strategy)
    codec = load_codec(flags.vae, strategy.device)
    run_program(MoverPretraining(recipe, lambda: load(Part.read(flags.start)).train(), strategy, codec), flags)


if __name__ == "__main__":
    main()
