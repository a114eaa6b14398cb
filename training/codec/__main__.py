"""Train the light codec: `python -m training.codec --data runs/data --out runs/codec`.

One thread, small batches of crops, bfloat16 where the processor has instructions for it. The decoder trains on latents
with a little noise, because a network's latents are never exact. A stopped run resumes from its last checkpoint bit for
bit; clips that arrive meanwhile join at checkpoints. `--export FOLDER` writes the EMA weights as a checkpoint's vae
folder and prints their metrics.

`--start FOLDER` begins with a finished codec. With `--scale 2` it is grown to pictures of twice the size, of which
`--data` holds clips, and with `--channels 32` its latents get channels for the detail.
`--decoder-of FOLDER` also trains only the decoder: the latents do not change, so networks that generate them and
prepared data stay valid.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from avatar.checkpoints.files import save
from avatar.checkpoints.part import Part, load_weights
from avatar.vae import light, vae
from avatar.vae.light import LightCodec, LightConfig
from training.codec.crops import CropConfig, load_crops
from training.codec.growth import add_detail, deepen, fit_outputs, grow
from training.codec.pca_init import normalise_latents, set_principal_components, untrained_codec
from training.codec.report import report
from training.data import StoredClip, read_clips
from training.loop import Limits, write_log
from training.strategy import SINGLE

# Held-out clips of a report during training.
NUM_REPORT_CLIPS = 24
# Brings squared errors to the size of absolute ones.
SQUARED = 10.0
# Height and width of the pictures of a codec of scale 1.
SIZE = 128
# Of codecs that are grown: a higher rate loses what growing gave them.
GROWN_RATE, GROWN_CROPS = 3e-4, CropConfig(batch_size=2, num_frames=9)
PLOTS = {"psnr": ("psnr", "psnr_mouth", "psnr_noisy"), "loss": ("loss", "loss_picture", "loss_edges", "loss_motion")}


@dataclass(frozen=True)
class CodecRecipe:
    """Configuration of a run, apart from its data.

    steps: of the whole run; the learning rate falls to zero along half a cosine. noise: upper bound of the latents'
    noise, drawn for each crop, in units of their standard deviation. edges, motion: loss weights of differences between
    neighbouring pixels, and between frames: without the latter a latent's frames, which are decoded together, jump to
    the next latent's. squared: errors are squared, which blurs less than absolute errors where detail is uncertain.
    detail: loss weight of the sharpness of small areas, which every error of single pixels makes too low.
    evenness: loss weight of the spread of the channels' variances. ema_decay: per step. start: vae folder of the codec
    to begin with. decoder_of: the same, if only its decoder is trained. scale, channels, encoder_depth: that it is
    grown to.
    """

    steps: int = 20000
    lr: float = 2e-3
    warmup: int = 100
    noise: float = 0.2
    evenness: float = 5e-3
    edges: float = 0.3
    motion: float = 0.5
    detail: float = 0.0
    ema_decay: float = 0.999
    seed: int = 0
    crops: CropConfig = field(default_factory=CropConfig)
    start: str | None = None
    decoder_of: str | None = None
    scale: int = 1
    channels: int = light.CHANNELS
    encoder_depth: int = 1
    squared: bool = False

    def lr_at(self, step: int) -> float:
        progress = min(1.0, step / self.steps)
        return self.lr * min(1.0, (step + 1) / self.warmup) * (0.5 + 0.5 * math.cos(math.pi * progress))


class CodecRun:
    """A training run: codec, EMA, optimizer and progress."""

    def __init__(self, recipe: CodecRecipe, clips: Sequence[StoredClip]) -> None:
        self.recipe = recipe
        self.step = 0
        self.num_clips = len(clips)
        if folder := recipe.decoder_of or recipe.start:
            self.codec = grown_codec(Path(folder), clips, recipe)
        else:
            sizes = {"scale": recipe.scale, "channels": recipe.channels, "encoder_depth": recipe.encoder_depth}
            config = replace(light.tiny(), **sizes)
            codec = untrained_codec(config, recipe.seed)
            set_principal_components(codec, clips, recipe.crops, recipe.seed)
            self.codec = normalise_latents(codec, clips, recipe.crops, recipe.seed)
        self._prepare()

    def _prepare(self) -> None:
        self.ema = deepcopy(self.codec).requires_grad_(False)
        self.codec.requires_grad_(True)
        self.codec.encoder.requires_grad_(not self.recipe.decoder_of)
        trainable = [weight for weight in self.codec.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, self.recipe.lr, (0.9, 0.99), weight_decay=1e-3)

    def save(self, path: Path) -> None:
        state = {
            "step": self.step,
            "num_clips": self.num_clips,
            "config": asdict(self.codec.config),
            "codec": self.codec.state_dict(),
            "average": self.ema.state_dict(),
            "optimiser": self.optimizer.state_dict(),
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.rename(path)

    @classmethod
    def load(cls, path: Path, recipe: CodecRecipe) -> "CodecRun":
        """Load a run as `save` wrote it."""
        state = torch.load(path, weights_only=True)
        run = cls.__new__(cls)
        run.recipe, run.step, run.num_clips = recipe, state["step"], state["num_clips"]
        run.codec = LightCodec(LightConfig(**state["config"]))
        run.codec.load_state_dict(state["codec"])
        run._prepare()
        run.ema.load_state_dict(state["average"])
        run.optimizer.load_state_dict(state["optimiser"])
        return run

    def advance(self, clips: Sequence[StoredClip]) -> dict[str, float]:
        """Take one optimizer step; return the loss and its terms."""
        recipe = self.recipe
        frames, pixel_weights = load_crops(clips[: self.num_clips], recipe.crops, recipe.seed + 1, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr_at(self.step)
        terms = loss_terms(self.codec, frames, pixel_weights, recipe, torch.Generator().manual_seed(self.step))
        weights = {
            "picture": 1.0,
            "edges": recipe.edges,
            "motion": recipe.motion,
            "spread": recipe.evenness,
            "detail": recipe.detail,
        }
        loss = torch.stack([weight * terms[name] for name, weight in weights.items()]).sum()
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.codec.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        # Early steps decay faster, so that the initial weights fade.
        decay = min(recipe.ema_decay, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            for mine, theirs in zip(self.ema.parameters(), self.codec.parameters(), strict=True):
                mine.lerp_(theirs, 1 - decay)
        return {"loss": float(loss.detach()), **{name: float(term.detach()) for name, term in terms.items()}}


def loss_terms(
    codec: LightCodec, frames: Tensor, weights: Tensor, recipe: CodecRecipe, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the loss terms for the reconstruction of frames (b, 3, f, h, w) and for their latents.

    weights: (b, 1, f, h, w) of each pixel's error. picture: absolute plus twice the squared error. edges, motion:
    absolute error of differences between neighbouring pixels, and between frames. With `recipe.squared` all three are
    SQUARED times the squared error. spread: mean square of the channels' log variances around their mean. detail:
    absolute error of `sharpness_map`.
    """

    def size(error: Tensor) -> Tensor:
        return SQUARED * error**2 if recipe.squared else error.abs()

    with SINGLE.autocast():
        latents = codec.encode(frames).float()
        amount = recipe.noise * torch.rand(len(frames), 1, 1, 1, 1, generator=generator) * latents.std()
        noise = amount * torch.randn(latents.shape, generator=generator)
        result = codec.decode(latents + noise, codec.new_state())
    error = result.float() - frames
    logs = latents.var((0, 2, 3, 4)).clamp_min(1e-6).log()
    return {
        "picture": ((size(error) + (0 if recipe.squared else 2) * error**2) * weights).mean(),
        "edges": size(error.diff(dim=-1)).mean() + size(error.diff(dim=-2)).mean(),
        "motion": size(error.diff(dim=2)).mean(),
        "spread": (logs - logs.mean()).pow(2).mean(),
        "detail": (sharpness_map(result.float()) - sharpness_map(frames)).abs().mean(),
    }


def sharpness_map(frames: Tensor) -> Tensor:
    """Return the mean absolute Laplacian of the brightness in squares of 8 pixels, which overlap by half.

    frames: (b, 3, f, h, w).
    """
    grey = rearrange(frames.mean(1), "b f h w -> (b f) 1 h w")
    neighbours = grey[..., :-2, 1:-1] + grey[..., 2:, 1:-1] + grey[..., 1:-1, :-2] + grey[..., 1:-1, 2:]
    return functional.avg_pool2d((neighbours - 4 * grey[..., 1:-1, 1:-1]).abs(), 8, 4)


def grown_codec(folder: Path, clips: Sequence[StoredClip], recipe: CodecRecipe) -> LightCodec:
    """Load the codec of a vae folder, and grow it to the recipe's scale and channels.

    ValueError if it is not a light codec, or has more channels.
    """
    codec = vae.load(Part.read(folder)).codec
    if not isinstance(codec, LightCodec):
        raise ValueError(f"{folder} holds another codec; only the light codec is trained here")
    if codec.config.channels > recipe.channels and not recipe.decoder_of:
        raise ValueError(f"{folder} has latents of {codec.config.channels} channels, give --channels as many or more")
    if recipe.scale > codec.config.scale:
        codec = grow(codec, recipe.scale)
        fit_outputs(codec, clips, recipe.crops, recipe.seed)
    if recipe.encoder_depth > codec.config.encoder_depth:
        codec = deepen(codec, recipe.encoder_depth, recipe.seed)
    if recipe.channels > codec.config.channels:
        codec = add_detail(codec, recipe.channels, clips, recipe.crops, recipe.seed)
    return codec


def train(data: Path, out: Path, recipe: CodecRecipe, limits: Limits) -> None:
    """Start or resume the run in `out`, until its last step or the time limit."""
    out.mkdir(parents=True, exist_ok=True)
    state = out / "state.pt"
    clips = read_clips(data, "train")
    held_out = read_clips(data, "held_out")[:NUM_REPORT_CLIPS]
    run = CodecRun.load(state, recipe) if state.exists() else CodecRun(recipe, clips)
    (out / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    if run.step == 0:
        write_log(out, {"step": 0, **report(run.ema, held_out)}, PLOTS)
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
                clips = checkpoint(run, data, out, {name: value / count for name, value in sums.items()}, held_out)
                sums, count, next_save = {}, 0, time.monotonic() + 60 * limits.save_minutes
    if count:
        checkpoint(run, data, out, {name: value / count for name, value in sums.items()}, held_out)


def checkpoint(
    run: CodecRun, data: Path, out: Path, means: dict[str, float], held_out: Sequence[StoredClip]
) -> list[StoredClip]:
    """Save and log the run, and take in newly arrived clips. Returns all training clips."""
    clips = read_clips(data, "train")
    run.num_clips = len(clips)
    run.save(out / "state.pt")
    metrics = report(run.ema, held_out, out / "sheet.png")
    losses = {name if name == "loss" else f"loss_{name}": value for name, value in means.items()}
    write_log(out, {"step": run.step, "clips": run.num_clips, **losses, **metrics}, PLOTS)
    return clips


def export(data: Path, out: Path, recipe: CodecRecipe, folder: Path) -> dict[str, float]:
    """Write the run's EMA as a vae folder, float16, its latents scaled to variance 1; return its metrics."""
    run = CodecRun.load(out / "state.pt", recipe)
    codec = run.ema
    if not recipe.decoder_of:
        codec = normalise_latents(codec, read_clips(data, "train")[: run.num_clips], recipe.crops, recipe.seed)
    size = SIZE * codec.config.scale
    picture = replace(vae.tiny().picture, width=size, height=size)
    config = replace(vae.tiny(), picture=picture, network=asdict(codec.config))
    save(folder, asdict(config), codec, torch.float16)
    load_weights(codec, Part.read(folder))
    return {"step": run.step, **report(codec, read_clips(data, "held_out"))}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.codec", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of shards that training.make_data wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run: state, log, previews")
    parser.add_argument("--start", help="vae folder: the codec to begin with")
    parser.add_argument("--decoder-of", help="vae folder: the codec to begin with; train its decoder alone")
    parser.add_argument("--scale", type=int, default=1, help="factor by which pictures are larger than 128 pixels")
    parser.add_argument("--channels", type=int, default=light.CHANNELS, help="channels of latents (default 16)")
    parser.add_argument("--encoder-depth", type=int, default=1, help="residual blocks of the encoder (default 1)")
    parser.add_argument("--rate", type=float, help="highest learning rate (default 0.002, for scale 2 0.0003)")
    parser.add_argument("--noise", type=float, default=CodecRecipe.noise, help="most noise on latents (default 0.2)")
    parser.add_argument("--lips", type=float, default=CropConfig.lips_gain, help="extra loss weight at the lips")
    parser.add_argument("--motion", type=float, default=CodecRecipe.motion, help="loss weight of frame differences")
    parser.add_argument(
        "--detail", type=float, default=CodecRecipe.detail, help="loss weight of small areas' sharpness"
    )
    parser.add_argument("--evenness", type=float, default=CodecRecipe.evenness, help="loss weight of even variances")
    parser.add_argument("--steps", type=int, default=CodecRecipe.steps, help="length of the whole run")
    parser.add_argument("--minutes", type=float, default=60, help="time limit; the next call resumes (default 60)")
    parser.add_argument("--save-minutes", type=float, default=4, help="time between two checkpoints (default 4)")
    parser.add_argument("--export", type=Path, help="do not train: write the run's EMA weights to this folder")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    if flags.start and flags.decoder_of:
        parser.error("--start and --decoder-of exclude each other")
    if flags.decoder_of and flags.channels != light.CHANNELS:
        parser.error("--decoder-of keeps the latents, so it excludes --channels; use --start")
    crops = replace(GROWN_CROPS, size=CropConfig.size * flags.scale) if flags.scale > 1 else CropConfig()
    recipe = CodecRecipe(
        steps=flags.steps,
        lr=flags.rate or (GROWN_RATE if flags.scale > 1 else CodecRecipe.lr),
        motion=flags.motion,
        detail=flags.detail,
        noise=flags.noise,
        crops=replace(crops, lips_gain=flags.lips),
        start=flags.start,
        decoder_of=flags.decoder_of,
        scale=flags.scale,
        channels=flags.channels,
        encoder_depth=flags.encoder_depth,
        evenness=flags.evenness,
        squared=flags.scale > 1,
    )
    if flags.export:
        print(json.dumps(export(flags.data, flags.out, recipe, flags.export), indent=2))
    else:
        train(flags.data, flags.out, recipe, Limits(flags.minutes, flags.save_minutes))


if __name__ == "__main__":
    main()
