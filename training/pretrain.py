"""Stage 1, causal pretraining: `python -m training.pretrain --data runs/latents --out runs/stage1`.

Block-causal flow matching: each block of a clip is noised to a level of its own and attends to the noisy blocks before
it, so that the network learns to denoise, to be causal, and to work with a history that is never clean. In a share of
the steps, blocks attend to a copy of the clip at the schedule's last level, which has a loss, too.
A stopped run resumes from its last checkpoint bit for bit; clips that arrive meanwhile join at checkpoints.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from avatar.checkpoints.part import Part
from avatar.denoiser import config as configs
from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.model import Network, load
from avatar.denoiser.sampler import autoregressive
from avatar.denoiser.speed import compile_layers
from avatar.vae.vae import Vae
from training.batches import BatchConfig, ClipBatch, Share, load_batch
from training.checkpointing import Progress
from training.clips import frame_sigmas, predict_velocities, predict_velocity
from training.data import StoredClip
from training.eval.previews import VALIDATION_SEED, load_codec, preview_rows
from training.initialise import initialise
from training.loop import argument_parser, cosine_schedule, overrides, run_program, update_ema
from training.lora import LoraConfig, make_trainable, weight_dtype
from training.losses import add_noise, add_noise_per_frame, draw_sigmas, draw_sink_distances, flow_matching_loss
from training.muon import Muon
from training.strategy import SINGLE, Strategy, checkpoint_activations, join

logger = logging.getLogger(__name__)

# Held-out clips of the validation loss, and of the gains of inputs.
NUM_VALIDATION_CLIPS, NUM_GAIN_CLIPS = 24, 12
# Second sigmas of a network of two levels, to choose between.
SECOND_SIGMAS = (0.3, 0.4, 0.5)
# From this step on, a network that an input makes no better by this share of the loss has become deaf to it.
GATE_STEP, MIN_GAIN = 400, 0.002


@dataclass(frozen=True)
class PretrainRecipe:
    """Configuration of a run, apart from its data and network.

    steps: of the whole run; learning rates follow half a cosine to a hundredth. muon_lr: of Muon, for the matrices of
    layers. lr: of AdamW, for the other weights, or for all with muon_lr 0. audio_lr: of AdamW for the audio injectors,
    if it differs. shift: of sigmas from the whole range. ema_decay: per step. noisy_motion: noise each motion frame to
    a level of its own. copied_history: share of the steps whose blocks have a copy of the clip at the schedule's last
    level as history, as where all levels share the last one's cache. checkpoint_activations: less memory for a second
    forward pass.
    """

    steps: int = 1300
    muon_lr: float = 4e-3
    lr: float = 2e-3
    audio_lr: float | None = None
    warmup: int = 50
    shift: float = 3.0
    ema_decay: float = 0.998
    noisy_motion: bool = False
    copied_history: float = 0.0
    checkpoint_activations: bool = False
    lora: LoraConfig | None = None
    seed: int = 0
    batches: BatchConfig = field(default_factory=BatchConfig)


def tiny() -> PretrainRecipe:
    """Return the recipe for small networks of blocks of 3 latents, trained from scratch."""
    return PretrainRecipe()


def tiny_256() -> PretrainRecipe:
    """Return the recipe of the embedded default.

    The window is full in two fifths of the blocks trained.
    """
    return PretrainRecipe(steps=4000, copied_history=0.2, batches=BatchConfig(num_blocks=(12, 12), detail_weight=0.0))


def base() -> PretrainRecipe:
    """Return the recipe of the public 14B network: LoRA makes it causal, with the frames before a clip as its history.

    Source: Live Avatar (arXiv 2512.04677) and the training configuration in its repository.
    """
    return PretrainRecipe(
        steps=25000,
        muon_lr=0.0,
        lr=5e-5,
        audio_lr=1e-5,
        warmup=500,
        shift=5.0,
        noisy_motion=True,
        checkpoint_activations=True,
        lora=LoraConfig(),
        batches=BatchConfig(
            batch_size=128, num_blocks=(7, 7), lips_gain=1.0, audio_dropout=0.15, motion_from_clip=True
        ),
    )


PRESETS: dict[str, tuple[Callable[[], NetworkConfig], Callable[[], PretrainRecipe]]] = {
    "tiny": (configs.tiny, tiny),
    "tiny_256": (configs.tiny_256, tiny_256),
    "base": (configs.base, base),
}


def make_optimizers(network: Network, recipe: PretrainRecipe) -> dict[str, Optimizer]:
    """Return Muon for the matrices inside layers and AdamW for the other trainable weights, by checkpoint name."""
    matrices: list[nn.Parameter] = []
    audio: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        is_layer_matrix = name.startswith(("blocks", "audio_injector", "heard_injector")) and parameter.ndim == 2
        if not parameter.requires_grad:
            continue
        if is_layer_matrix and recipe.muon_lr:
            matrices.append(parameter)
        elif recipe.audio_lr and name.startswith("audio_injector"):
            audio.append(parameter)
        else:
            others.append(parameter)
    groups: list[dict[str, Any]] = [{"params": others}]
    if audio:
        groups.append({"params": audio, "lr": recipe.audio_lr})
    optimizers: dict[str, Optimizer] = {"adamw": torch.optim.AdamW(groups, recipe.lr, (0.9, 0.98), weight_decay=0.01)}
    if matrices:
        optimizers = {"muon": Muon(matrices, recipe.muon_lr, weight_decay=0.01), **optimizers}
    return optimizers


class Pretraining:
    """A run of stage 1: a network, its EMA, and the optimizers."""

    def __init__(
        self,
        recipe: PretrainRecipe,
        make_network: Callable[[], Network],
        strategy: Strategy = SINGLE,
        codec: Vae[Any] | None = None,
    ) -> None:
        """make_network: returns a new network with the run's initial weights. codec: for previews.

        ValueError if the recipe uses Muon on shards.
        """
        if strategy.kind == "fsdp2" and recipe.muon_lr:
            raise ValueError("Muon needs whole matrices, which FSDP2 shards: set muon_lr to 0, or use DDP")
        self.recipe, self.steps, self.strategy, self.codec = recipe, recipe.steps, strategy, codec
        self.progress = Progress()
        network = make_trainable(make_network(), recipe.lora, recipe.seed)
        self.wrapped = strategy.wrap(checkpoint_activations(network) if recipe.checkpoint_activations else network)
        ema = make_trainable(make_network(), recipe.lora, recipe.seed).requires_grad_(False)
        self.ema, self.config = strategy.wrap(ema), network.config
        self.optimizers = make_optimizers(self.wrapped.network, recipe)
        self.parts: Mapping[str, nn.Module | Optimizer] = {
            "network": self.wrapped.network,
            "average": self.ema.network,
            **self.optimizers,
        }
        self._base_lrs = {name: [g["lr"] for g in each.param_groups] for name, each in self.optimizers.items()}

    def advance(self, clips: Sequence[StoredClip]) -> dict[str, float]:
        recipe, step, network = self.recipe, self.progress.step, self.wrapped.network
        batch = load_batch(clips, recipe.batches, self.config, recipe.seed + 1, step, self.strategy.share)
        random = Generator().manual_seed((recipe.seed + 1) << 32 | step)
        with self.strategy.autocast():
            losses = self.wrapped(
                clip_losses, network, batch.to(self.strategy.device), recipe, random, self.strategy.share
            )
        loss = losses.mean()
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

    def validate(self, held_out: Sequence[StoredClip]) -> dict[str, float]:
        """Return the EMA's loss on held-out clips, always the same clips at the same levels, and the inputs' gains.

        For a network of two levels, also what two passes explain by the sigma of the second.
        """
        batches = self.recipe.batches
        count = max(1, NUM_VALIDATION_CLIPS // batches.batch_size)
        loss = self._held_out_loss(held_out, batches, count)
        sigmas = SECOND_SIGMAS if self.config.num_levels == 2 else ()
        explained = {f"r2_at_{sigma:g}": self._explained(held_out, sigma) for sigma in sigmas}
        return {"held_out_loss": loss, **explained, **self._gains(held_out)}

    @torch.no_grad()
    def _explained(self, held_out: Sequence[StoredClip], sigma: float) -> float:
        """Return `explained_share` of held-out clips whose inputs are all given. sigma: of the second pass."""
        strategy, shares = self.strategy, []
        batches = replace(self.recipe.batches, audio_dropout=0.0, heard_dropout=0.0, face_motion_dropout=0.0)
        for number in range(max(1, NUM_GAIN_CLIPS // batches.batch_size)):
            batch = load_batch(held_out, batches, self.config, VALIDATION_SEED, number, strategy.share)
            random = Generator().manual_seed(number)
            with strategy.autocast():
                network = self.ema.network
                given = (network, batch.to(strategy.device), (self.config.schedule[0], sigma), random, strategy.share)
                shares.append(self.ema(explained_share, *given))
        return float(torch.stack(shares).mean())

    def _gains(self, held_out: Sequence[StoredClip]) -> dict[str, float]:
        """Return how much the loss rises, as a share of it, where each clip gets another clip's input, by input.

        An input without a gain is ignored: behind an encoder that learns nothing, an injector learns nothing either.
        """
        whole = replace(self.recipe.batches, audio_dropout=0.0, heard_dropout=0.0, face_motion_dropout=0.0)
        if whole.batch_size // self.strategy.share.world < 2:
            return {}
        count = max(1, NUM_GAIN_CLIPS // whole.batch_size)
        loss = cache(lambda batches, swapped: self._held_out_loss(held_out, batches, count, swapped))
        gains = {}
        for name in ("features", *self.config.inputs):
            # Face motion shows most of what the other's voice causes.
            batches = replace(whole, face_motion_dropout=1.0) if name == "heard" else whole
            gains[f"{name}_gain"] = loss(batches, name) / loss(batches, None) - 1
        if self.progress.step >= GATE_STEP:
            for name, gain in gains.items():
                if gain < MIN_GAIN:
                    logger.warning("an input is ignored: %s is %.4f; pretrain its encoder longer", name, gain)
        return gains

    @torch.no_grad()
    def _held_out_loss(
        self, held_out: Sequence[StoredClip], batches: BatchConfig, count: int, swapped: str | None = None
    ) -> float:
        """Return the EMA's loss on `count` batches. swapped: the input of which each clip gets another clip's."""
        strategy, losses = self.strategy, []
        for number in range(count):
            batch = load_batch(held_out, batches, self.config, VALIDATION_SEED, number, strategy.share)
            batch = (batch.swapped(swapped) if swapped else batch).to(strategy.device)
            random = Generator().manual_seed(number)
            with strategy.autocast():
                losses.append(self.ema(clip_losses, self.ema.network, batch, self.recipe, random, strategy.share))
        return float(torch.cat(losses).mean())

    def preview(self, held_out: Sequence[StoredClip]) -> list[Tensor]:
        return preview_rows(self.ema, self.config, held_out, self.codec, self.strategy)


def clip_losses(network: Network, batch: ClipBatch, recipe: PretrainRecipe, random: Generator, share: Share) -> Tensor:
    """Return the loss of each clip, (b,), at levels and with noise drawn from `random`."""
    config, clean = network.config, batch.latents
    num_blocks = clean.shape[2] // config.num_frames_per_block
    sigmas = share.of(draw_sigmas(len(clean) * share.world, num_blocks, config, recipe.shift, random)).to(clean)
    noise = autoregressive(share.noise(clean.shape, random), config.noise_correlation).to(clean)
    distances = draw_sink_distances(config, num_blocks, random)
    if recipe.noisy_motion:
        batch = batch.replace(motion=add_noise_per_frame(batch.motion, share, random))
    sigma = frame_sigmas(sigmas, config)
    versions = [(noise, sigma, sigmas)]
    if recipe.copied_history and torch.rand((), generator=random) < recipe.copied_history:
        last = torch.full_like(sigmas, config.schedule[-2])
        other = autoregressive(share.noise(clean.shape, random), config.noise_correlation).to(clean)
        versions.insert(0, (other, frame_sigmas(last, config), last))
    inputs = [(add_noise(clean, noise, sigma), sigmas) for noise, sigma, sigmas in versions]
    velocities = predict_velocities(network, config, inputs, batch, distances)
    losses = [
        flow_matching_loss(velocity, noise - clean, sigma, batch.weight, config)
        for velocity, (noise, sigma, _) in zip(velocities, versions, strict=True)
    ]
    return torch.stack(losses).mean(0)


def explained_share(
    network: Network, batch: ClipBatch, sigmas: tuple[float, ...], random: Generator, share: Share
) -> Tensor:
    """Return the share of the clips' motion (R^2 about each clip's mean) that passes from noise at sigmas explain."""
    config, clean = network.config, batch.latents
    num_blocks = clean.shape[2] // config.num_frames_per_block
    x = autoregressive(share.noise(clean.shape, random), config.noise_correlation).to(clean)
    distances = draw_sink_distances(config, num_blocks, random)
    for sigma, following in pairwise((*sigmas, 0.0)):
        level = torch.full((len(clean), num_blocks), sigma).to(clean)
        x = x + (following - sigma) * predict_velocity(network, config, x, level, batch, distances)
    error, motion = x - clean, clean - clean.mean(2, keepdim=True)
    return 1 - (error**2 * batch.weight).sum() / (motion**2 * batch.weight).sum()


def main() -> None:
    parser = argument_parser("training.pretrain", __doc__ or "", steps="optimizer steps")
    parser.add_argument("--start", type=Path, help="denoiser folder with the initial weights of a new run")
    parser.add_argument("--compile", action="store_true", help="compile the layers: faster after a slow start")
    flags = parser.parse_args()
    network_config, preset = PRESETS[flags.preset]
    recipe = replace(preset(), **overrides(steps=flags.steps, lora=flags.adapter))
    if flags.batch:
        recipe = replace(recipe, batches=replace(recipe.batches, batch_size=flags.batch))
    if flags.strategy == "fsdp2" or recipe.lora:
        # Muon needs whole matrices; a LoRA adapter is trained by AdamW under every strategy.
        recipe = replace(recipe, muon_lr=0.0)
    torch.set_num_threads(1)

    def make_network() -> Network:
        if flags.start:
            network = load(Part.read(flags.start), dtype=weight_dtype(recipe.lora)).train()
        else:
            network = Network(network_config())
            initialise(network, recipe.seed)
        if flags.compile:
            compile_layers(network)
        return network

    strategy = join(flags.strategy)
    run_program(Pretraining(recipe, make_network, strategy, load_codec(flags.vae, strategy.device)), flags)


if __name__ == "__main__":
    main()
