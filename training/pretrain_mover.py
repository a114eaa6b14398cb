"""Pretrain the mover before stage 1:

    python -m training.pretrain_mover --data DATA --start runs/audio --vae runs/model/vae --out runs/mover

The mover learns to show the frames of clips from the reference alone, by their true face motion, jaw and brows; no
latents are involved. Then it and the codec that it moves pictures of are written into the network: stage 1 starts from
it with `--start runs/mover/denoiser`. A stopped run resumes bit for bit.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from avatar.checkpoints.part import Part
from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.model import Network
from avatar.vae import vae
from avatar.vae.light import LightCodec
from training.batches import face_motion_of
from training.checkpointing import Progress
from training.codec.crops import eyes_of, lips_weight, recolour
from training.data import StoredClip
from training.initialise import copy_weights, initialise
from training.loop import argument_parser, cosine_schedule, overrides, run_program, update_ema
from training.lora import LoraConfig
from training.muon import Muon
from training.strategy import SINGLE, Strategy, join

# Pictures are compared at half their sides, and at halves of these: what is coarse shows large shifts, too.
SHRINK, NUM_SCALES = 2, 4
# Signs of the mover's values in a mirrored picture: yaw, roll and gaze to the right change theirs.
MIRRORED = (1, 1, -1, -1, -1, 1, 1, 1)
# Height of brows above their eyes, as a share of the distance from the lips to the eyes' middle.
BROWS_ABOVE = 0.28
# A frame is drawn with a weight of 1 + this times how far its brows are raised, 0 to 0.5. They rise in 4 % of the
# frames, by a few pixels: a mover that saw them so seldom ignored them.
BROW_DRAWS = 100.0
# Frames of each held-out clip that are measured, and shown in a preview of the first clips.
VALIDATION_STRIDE, NUM_PREVIEW_CLIPS = 24, 4


@dataclass(frozen=True)
class MoverRecipe:
    """Configuration of a run, apart from its data and network.

    steps: of the whole run; learning rates fall along half a cosine to a hundredth. muon_lr: of Muon, for convolutions.
    lr: of AdamW, for the other weights. num_clips, num_frames: of a step, of all processes together: many people and
    few frames of each. lips_gain: extra loss weight at the centre of lips and eyes.
    """

    steps: int = 12000
    muon_lr: float = 6e-3
    lr: float = 2e-3
    warmup: int = 50
    ema_decay: float = 0.99
    num_clips: int = 16
    num_frames: int = 3
    lips_gain: float = 5.0
    seed: int = 0
    lora: LoraConfig | None = None


@dataclass(frozen=True, eq=False)
class Frames:
    """Frames of clips: references (b, 3, H, W) in [-1, 1] and values (b, m, f) of the mover; and what they show.

    pictures: (b, 3, f, H/2, W/2). weights: (b, 1, f, H/2, W/2) of mean 1, of each pixel's error.
    """

    pictures: Tensor
    references: Tensor
    values: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> "Frames":
        return Frames(**{name: each.to(device) for name, each in vars(self).items()})


def read_frames(clip: StoredClip, indexes: Sequence[int], lips_gain: float = 0.0) -> Frames:
    """Read some frames of a clip as a batch of one."""
    pictures = np.concatenate([clip.frames(slice(index, index + 1)) for index in indexes])
    others = [torch.from_numpy(np.array(clip.array(name), np.float32))[None] for name in ("jaw", "brow")]
    values = torch.cat([face_motion_of(clip), *others])[:, indexes]
    lips, pose = (np.array(clip.array(name), np.float32)[indexes] for name in ("lips", "pose"))
    height, width = (side // SHRINK for side in pictures.shape[1:3])
    eyes = eyes_of(lips / SHRINK, pose, height)
    brows = [eye + BROWS_ABOVE * (sum(eyes) / 2 - lips / SHRINK) for eye in eyes]
    weights = lips_weight(lips / SHRINK, height, width, lips_gain, eyes=[*eyes, *brows])
    small = functional.avg_pool3d(to_signed(pictures), (1, SHRINK, SHRINK))
    reference = to_signed(np.array(clip.array("reference"))[None])[:, 0]
    return Frames(small[None], reference[None], values[None], weights[None])


def augment(frames: Frames, rng: np.random.Generator) -> Frames:
    """Recolour the frames of one clip, and mirror half of all clips."""
    seed = int(rng.integers(1 << 32))
    pictures, references = (
        recolour(each, np.random.default_rng(seed)) for each in (frames.pictures[0], frames.references.transpose(0, 1))
    )
    frames = replace(frames, pictures=pictures[None], references=references.transpose(0, 1))
    return mirror(frames) if rng.random() < 0.5 else frames


def mirror(frames: Frames) -> Frames:
    """Mirror frames, with their values."""
    flipped = {name: getattr(frames, name).flip(-1) for name in ("pictures", "references", "weights")}
    return Frames(**flipped, values=frames.values * frames.values.new_tensor(MIRRORED)[:, None])


def to_signed(pictures: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    """Convert pictures (f, H, W, 3) to (3, f, H, W) in [-1, 1]."""
    return rearrange(torch.from_numpy(pictures), "f h w c -> c f h w").float() / 127.5 - 1


class MoverPretraining:
    """A run: the network, of which only the mover is trained, and its EMA."""

    def __init__(self, recipe: MoverRecipe, make_network: Callable[[], Network], strategy: Strategy = SINGLE) -> None:
        """ValueError if the network has no mover."""
        self.recipe, self.steps, self.strategy = recipe, recipe.steps, strategy
        self.progress = Progress()
        network = make_network()
        if not network.config.mover:
            raise ValueError("the network has no mover")
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name.startswith("mover.") and not name.startswith("mover.codec."))
        self.network, self.config = strategy.wrap(network), network.config
        self.ema = strategy.wrap(make_network().requires_grad_(False))
        kernels: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, weight in network.mover.named_parameters():
            if weight.requires_grad:
                (kernels if weight.ndim == 4 and not name.startswith("leave") else others).append(weight)
        self.optimizers: dict[str, Optimizer] = {
            "muon": Muon(kernels, recipe.muon_lr, weight_decay=0.01),
            "adamw": torch.optim.AdamW(others, recipe.lr, (0.9, 0.98), weight_decay=0.01),
        }
        self.parts: Mapping[str, nn.Module | Optimizer] = {
            "network": self.network.network,
            "average": self.ema.network,
            **self.optimizers,
        }

    def advance(self, clips: Sequence[StoredClip]) -> dict[str, float]:
        recipe, step, network = self.recipe, self.progress.step, self.network.network
        frames = self.draw(clips)
        with self.strategy.autocast():
            shown = self.network(show, network, frames)
        loss = picture_loss(shown, frames)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        factor = cosine_schedule(step, recipe.steps, recipe.warmup)
        for optimizer, lr in zip(self.optimizers.values(), (recipe.muon_lr, recipe.lr), strict=True):
            optimizer.param_groups[0]["lr"] = lr * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        update_ema(self.ema.network, network, recipe.ema_decay, self.progress.step)
        return {"loss": float(loss.detach())}

    def draw(self, clips: Sequence[StoredClip]) -> Frames:
        """Draw this process's share of a step's frames."""
        recipe, share = self.recipe, self.strategy.share
        rng = np.random.default_rng((recipe.seed + 5, self.progress.step))
        drawn = []
        for _ in range(recipe.num_clips):
            clip = clips[int(rng.integers(len(clips)))]
            raised = 1 + BROW_DRAWS * np.array(clip.array("brow"), np.float64)
            indexes = rng.choice(clip.num_frames, recipe.num_frames, replace=False, p=raised / raised.sum())
            drawn.append((clip, indexes.tolist(), rng.spawn(1)[0]))
        mine = drawn[share.rank :: share.world]
        each = [augment(read_frames(clip, indexes, recipe.lips_gain), own) for clip, indexes, own in mine]
        whole = Frames(**{name: torch.cat([vars(one)[name] for one in each]) for name in vars(each[0])})
        return whole.to(self.strategy.device)

    @torch.no_grad()
    def validate(self, held_out: Sequence[StoredClip]) -> dict[str, float]:
        """Return the PSNR (dB) of frames of held-out clips that the EMA shows, and of the still reference."""
        moved, still = [], []
        for clip in held_out:
            frames = read_frames(clip, range(0, clip.num_frames, VALIDATION_STRIDE)).to(self.strategy.device)
            shown = self.ema(show, self.ema.network, frames)
            moved.append(((shown - frames.pictures) ** 2).mean())
            small = functional.avg_pool2d(frames.references, SHRINK)[:, :, None]
            still.append(((small - frames.pictures) ** 2).mean())
        return {
            name: 10 * math.log10(4 / float(torch.stack(errors).mean()))
            for name, errors in (("psnr", moved), ("psnr_still", still))
        }

    @torch.no_grad()
    def preview(self, held_out: Sequence[StoredClip]) -> list[Tensor]:
        """Return rows of frames (n, 3, h, w): held-out clips, and below each the reference as the EMA moves it."""
        rows = []
        for clip in held_out[:NUM_PREVIEW_CLIPS]:
            frames = read_frames(clip, range(0, clip.num_frames, VALIDATION_STRIDE // 2)).to(self.strategy.device)
            pair = frames.pictures, self.ema(show, self.ema.network, frames)
            rows += [each[0].transpose(0, 1).cpu() for each in pair]
        return rows


def show(network: Network, frames: Frames) -> Tensor:
    """Return the frames that a network's mover shows in place of the true ones, (b, 3, f, H/2, W/2)."""
    texture = network.mover.look(frames.references)
    small = replace(texture, picture=functional.avg_pool2d(frames.references, SHRINK))
    return network.mover.show(small, frames.values)


def picture_loss(shown: Tensor, frames: Frames) -> Tensor:
    """Return the sum of weighted absolute errors at several scales, so that what is far off has a gradient, too."""
    losses = []
    for power in range(NUM_SCALES):
        window = (1, 2**power, 2**power)
        small = [functional.avg_pool3d(each, window) for each in (shown, frames.pictures, frames.weights)]
        losses.append(((small[0] - small[1]).abs() * small[2]).mean())
    return torch.stack(losses).sum()


def make_network(start: Path, codec: LightCodec) -> Network:
    """Return the network of a denoiser folder with a new mover for a codec."""
    part = Part.read(start)
    with part.naming_config():
        config = replace(NetworkConfig.from_dict(part.config), mover=codec.config)
    network = Network(config)
    initialise(network, 0)
    copy_weights(network, part)
    network.mover.codec.load_state_dict(codec.state_dict())
    return network


def main() -> None:
    parser = argument_parser(
        "training.pretrain_mover",
        __doc__ or "",
        steps="optimizer steps",
        presets=("tiny_256",),
        shards_of="training.make_data",
    )
    parser.add_argument("--start", type=Path, required=True, help="denoiser folder that training.pretrain_audio wrote")
    flags = parser.parse_args()
    if flags.vae is None:
        parser.error("--vae: the codec whose pictures are moved")
    recipe = replace(MoverRecipe(), **overrides(steps=flags.steps, num_clips=flags.batch))
    torch.set_num_threads(1)
    codec = vae.load(Part.read(flags.vae)).codec
    if not isinstance(codec, LightCodec):
        parser.error("--vae: a mover needs the light codec")
    run_program(MoverPretraining(recipe, lambda: make_network(flags.start, codec), join(flags.strategy)), flags)


if __name__ == "__main__":
    main()
