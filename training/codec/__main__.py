"""Train the light codec: `python -m training.codec --data runs/data --out runs/codec`.

One thread, small batches of crops, bf16 where the processor has instructions for it. The decoder sees latents with a
little noise on them, because a network that makes latents never makes them exactly. A run that is stopped goes on from
its last checkpoint as if nothing had happened, bit for bit; clips that have arrived meanwhile join at checkpoints.
Nothing is shipped by itself: `--export FOLDER` writes the averaged weights as a checkpoint's vae folder, with their
figures on standard output.

`--decoder-of FOLDER` trains the decoder of a finished codec further and leaves its encoder alone: latents stay what
they are, and so networks that make them, and prepared data, stay good.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from avatar.checkpoints.files import save
from avatar.checkpoints.part import Part, load_weights
from avatar.vae import light, vae
from avatar.vae.light import LightCodec
from training.codec.crops import CropRule, batch_of
from training.codec.pca_init import normalised, principal_components
from training.codec.report import report
from training.data import StoredClip, read_clips
from training.eval.contact_sheets import save_plot
from training.strategy import SINGLE

STARTS = ("pca", "cosine")
# Held-out clips that a report looks at.
NUM_REPORTED = 24


@dataclass(frozen=True)
class Recipe:
    """What decides a run, beside its data.

    steps: of the whole run; the learning rate falls to zero along half a cosine. noise: at most this much of the
    latents' deviation is added, by chance for each crop. edges, motion: weights of errors in differences between
    neighbours, and between frames: a latent's frames, decoded together, otherwise part from the next one's by a jump.
    evenness: weight of the spread of the channels' variances.
    average: how much of itself the average of the weights keeps each step. decoder_of: the vae folder whose decoder
    alone is trained further; `start` says nothing then.
    """

    start: str = "pca"
    steps: int = 20000
    rate: float = 2e-3
    warmup: int = 100
    noise: float = 0.2
    evenness: float = 5e-3
    edges: float = 0.3
    motion: float = 0.5
    average: float = 0.999
    seed: int = 0
    crops: CropRule = field(default_factory=CropRule)
    decoder_of: str | None = None

    def rate_at(self, step: int) -> float:
        progress = min(1.0, step / self.steps)
        return self.rate * min(1.0, (step + 1) / self.warmup) * (0.5 + 0.5 * math.cos(math.pi * progress))


class Run:
    """A training run: weights, their average, the optimiser, and how far it is."""

    def __init__(self, recipe: Recipe, clips: Sequence[StoredClip]) -> None:
        self.recipe = recipe
        self.step = 0
        self.num_clips = len(clips)
        if recipe.decoder_of:
            self.codec = finished(Path(recipe.decoder_of))
        else:
            codec = light.initialise(light.tiny(), recipe.seed)
            if recipe.start == "pca":
                principal_components(codec, clips, recipe.crops, recipe.seed)
            self.codec = normalised(codec, clips, recipe.crops, recipe.seed)
        self._prepare()

    def _prepare(self) -> None:
        self.average = deepcopy(self.codec).requires_grad_(False)
        self.codec.encoder.requires_grad_(not self.recipe.decoder_of)
        trained = [weight for weight in self.codec.parameters() if weight.requires_grad]
        self.optimiser = torch.optim.AdamW(trained, self.recipe.rate, (0.9, 0.99), weight_decay=1e-3)

    def save(self, path: Path) -> None:
        state = {
            "step": self.step,
            "num_clips": self.num_clips,
            "latent_scale": self.codec.config.latent_scale,
            "codec": self.codec.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.rename(path)

    @classmethod
    def load(cls, path: Path, recipe: Recipe) -> "Run":
        """The run as it was saved."""
        state = torch.load(path, weights_only=True)
        run = cls.__new__(cls)
        run.recipe, run.step, run.num_clips = recipe, state["step"], state["num_clips"]
        run.codec = LightCodec(replace(light.tiny(), latent_scale=state["latent_scale"]))
        run.codec.load_state_dict(state["codec"])
        run._prepare()
        run.average.load_state_dict(state["average"])
        run.optimiser.load_state_dict(state["optimiser"])
        return run

    def advance(self, clips: Sequence[StoredClip]) -> dict[str, float]:
        """One step of the optimiser; returns the parts of its loss."""
        recipe = self.recipe
        frames, pixel_weights = batch_of(clips[: self.num_clips], recipe.crops, recipe.seed + 1, self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = recipe.rate_at(self.step)
        parts = losses(self.codec, frames, pixel_weights, recipe, torch.Generator().manual_seed(self.step))
        weights = {"picture": 1.0, "edges": recipe.edges, "motion": recipe.motion, "spread": recipe.evenness}
        loss = torch.stack([weight * parts[name] for name, weight in weights.items()]).sum()
        self.optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.codec.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        # A young average would remember the start for too long.
        keep = min(recipe.average, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            for mine, theirs in zip(self.average.parameters(), self.codec.parameters(), strict=True):
                mine.lerp_(theirs, 1 - keep)
        return {"loss": float(loss.detach()), **{name: float(part.detach()) for name, part in parts.items()}}


def losses(
    codec: LightCodec, frames: Tensor, weights: Tensor, recipe: Recipe, generator: torch.Generator
) -> dict[str, Tensor]:
    """What is wrong with the reconstruction of frames (b, 3, f, h, w), and with their latents.

    weights: (b, 1, f, h, w) how much a pixel's error counts. picture: absolute and squared error. edges, motion:
    absolute error of differences between neighbours, and between frames. spread: mean square of the channels' log
    variances, less their mean.
    """
    with SINGLE.autocast():
        latents = codec.encode(frames).float()
        amount = recipe.noise * torch.rand(len(frames), 1, 1, 1, 1, generator=generator) * latents.std()
        noise = amount * torch.randn(latents.shape, generator=generator)
        result = codec.decode(latents + noise, codec.new_state())
    error = result.float() - frames
    logs = latents.var((0, 2, 3, 4)).clamp_min(1e-6).log()
    return {
        "picture": ((error.abs() + 2 * error**2) * weights).mean(),
        "edges": error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean(),
        "motion": error.diff(dim=2).abs().mean(),
        "spread": (logs - logs.mean()).pow(2).mean(),
    }


def finished(folder: Path) -> LightCodec:
    """The codec of a checkpoint's vae folder, to be trained. ValueError if it has another one."""
    codec = vae.load(Part.read(folder)).codec
    if not isinstance(codec, LightCodec):
        raise ValueError(f"{folder} has no light codec, and no other is trained here")
    return codec.requires_grad_(True)


@dataclass(frozen=True)
class Limits:
    """When a session of training ends, and how often it keeps its work, in minutes."""

    minutes: float
    save_minutes: float


def train(data: Path, out: Path, recipe: Recipe, limits: Limits) -> None:
    """Begin or go on with the run in `out`, until its last step or the time is up."""
    out.mkdir(parents=True, exist_ok=True)
    state = out / "state.pt"
    clips = read_clips(data, "train")
    held_out = read_clips(data, "held_out")[:NUM_REPORTED]
    run = Run.load(state, recipe) if state.exists() else Run(recipe, clips)
    (out / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    if run.step == 0:
        note(out, {"step": 0, **report(run.average, held_out)})
    deadline, next_save = time.monotonic() + 60 * limits.minutes, time.monotonic() + 60 * limits.save_minutes
    sums: dict[str, float] = {}
    count = 0
    with tqdm(total=recipe.steps, initial=run.step, unit="step", mininterval=20) as progress:
        while run.step < recipe.steps and time.monotonic() < deadline:
            for name, value in run.advance(clips).items():
                sums[name] = sums.get(name, 0.0) + value
            count += 1
            progress.update()
            if time.monotonic() > next_save:
                clips = keep(run, data, out, {name: value / count for name, value in sums.items()}, held_out)
                sums, count, next_save = {}, 0, time.monotonic() + 60 * limits.save_minutes
    if count:
        keep(run, data, out, {name: value / count for name, value in sums.items()}, held_out)


def keep(run: Run, data: Path, out: Path, means: dict[str, float], held_out: Sequence[StoredClip]) -> list[StoredClip]:
    """Take in the clips that are there now, save the run, and write down how it does. Returns the clips."""
    clips = read_clips(data, "train")
    run.num_clips = len(clips)
    run.save(out / "state.pt")
    figures = report(run.average, held_out, out / "sheet.png")
    note(out, {"step": run.step, "clips": run.num_clips, **means, **figures})
    return clips


def note(out: Path, entry: dict[str, Any]) -> None:
    """Add an entry to the run's log, and draw its curves."""
    path = out / "log.jsonl"
    with path.open("a") as file:
        file.write(json.dumps({name: round(value, 5) for name, value in entry.items()}) + "\n")
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    plots = {"psnr": ("psnr", "psnr_mouth", "psnr_noisy"), "loss": ("loss", "picture", "edges", "motion")}
    for plot, names in plots.items():
        curves = {name: [(e["step"], e[name]) for e in entries if name in e] for name in names}
        save_plot(out / f"{plot}.png", curves)


def export(data: Path, out: Path, recipe: Recipe, folder: Path) -> dict[str, float]:
    """Write the run's average as a checkpoint's vae folder, float16, latents of variance 1; returns its figures."""
    run = Run.load(out / "state.pt", recipe)
    codec = run.average
    if not recipe.decoder_of:
        codec = normalised(codec, read_clips(data, "train")[: run.num_clips], recipe.crops, recipe.seed)
    config = replace(vae.tiny(), network=asdict(codec.config))
    save(folder, asdict(config), codec, torch.float16)
    load_weights(codec, Part.read(folder))
    return {"step": run.step, **report(codec, read_clips(data, "held_out"))}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.codec", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of shards, as training.make_data makes it")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run: state, log, sheets")
    parser.add_argument("--start", choices=STARTS, default="pca", help="what the linear map is before training")
    parser.add_argument("--decoder-of", help="a vae folder: train its decoder further, and nothing else")
    parser.add_argument("--rate", type=float, default=Recipe.rate, help="the highest learning rate")
    parser.add_argument("--lips", type=float, default=CropRule.lips, help="how much more errors count at the lips")
    parser.add_argument("--motion", type=float, default=Recipe.motion, help="weight of errors from frame to frame")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="length of the whole run")
    parser.add_argument("--minutes", type=float, default=60, help="stop after this long; the next call goes on")
    parser.add_argument("--save-minutes", type=float, default=4, help="between two checkpoints")
    parser.add_argument("--export", type=Path, help="train nothing: write the run's weights to this folder")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    recipe = Recipe(
        start=flags.start,
        steps=flags.steps,
        rate=flags.rate,
        motion=flags.motion,
        crops=CropRule(lips=flags.lips),
        decoder_of=flags.decoder_of,
    )
    if flags.export:
        print(json.dumps(export(flags.data, flags.out, recipe, flags.export), indent=2))
    else:
        train(flags.data, flags.out, recipe, Limits(flags.minutes, flags.save_minutes))


if __name__ == "__main__":
    main()
