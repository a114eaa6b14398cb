"""The training loop and command line that both stages share, and the files of a run.

state/STEP   the run's state as torch.distributed.checkpoint writes it: each process its shards
log.jsonl    an entry per checkpoint, plotted in loss.png
events.*     metrics of every step, for TensorBoard
sheet.png    previews: held-out clips, and below each the network's own; only where a codec is given
recipe.json  the run's configuration
"""

import json
import math
import signal
import threading
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from avatar.denoiser.config import NetworkConfig
from training.checkpointing import Parts, Progress, export, restore, save
from training.data import SplitFolder, StoredClip, read_clips
from training.eval.contact_sheets import save_plot, save_sheet
from training.lora import LoraConfig
from training.strategy import STRATEGIES, Strategy, WrappedNetwork, leave

NETWORKS = ("tiny", "tiny_256", "base")
# Checkpoints per preview.
PREVIEW_INTERVAL = 4


class TrainingRun(Protocol):
    """A stage's training, as `train` drives it.

    recipe: a dataclass. steps: of the whole run. parts: networks and optimizers to checkpoint. ema: the network that is
    validated, previewed and exported.
    """

    recipe: Any
    steps: int
    strategy: Strategy
    progress: Progress
    parts: Parts
    ema: WrappedNetwork
    config: NetworkConfig

    def advance(self, clips: Sequence[StoredClip]) -> dict[str, float]:
        """Take one optimizer step and return its metrics."""

    def validate(self, held_out: Sequence[StoredClip]) -> dict[str, float]:
        """Return metrics on held-out clips."""

    def preview(self, held_out: Sequence[StoredClip]) -> list[Tensor]:
        """Return rows of frames (n, 3, h, w): held-out clips and the network's own. Empty without a codec."""


@dataclass(frozen=True)
class Limits:
    """Time limits of a program, in minutes: its end, and between two checkpoints."""

    minutes: float
    save_minutes: float


def argument_parser(
    module: str, doc: str, steps: str, presets: Sequence[str] = NETWORKS, shards_of: str = "training.prepare"
) -> ArgumentParser:
    """Return a parser with the flags that all stages share.

    steps: the unit of --steps. presets: of --preset. shards_of: the program that writes --data.
    """
    parser = ArgumentParser(prog=f"python -m {module}", description=doc.split(":")[0])
    parser.add_argument("--data", type=Path, required=True, help=f"folder of shards that {shards_of} wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run: state, log, previews")
    parser.add_argument("--preset", choices=presets, default="tiny", help="recipe and network")
    parser.add_argument("--steps", type=int, help=f"length of the whole run, in {steps}")
    parser.add_argument("--batch", type=int, help="clips per step, of all processes together")
    parser.add_argument("--strategy", choices=STRATEGIES, default="single", help="ddp and fsdp2 need torchrun")
    if "base" in presets:
        adapter = "RANK,ALPHA: train a LoRA adapter in place of the weights"
        parser.add_argument("--adapter", type=lora_config, help=adapter)
    parser.add_argument("--vae", type=Path, help="vae folder of a checkpoint, to decode previews with")
    parser.add_argument("--minutes", type=float, default=60, help="time limit; the next call resumes (default 60)")
    parser.add_argument("--save-minutes", type=float, default=5, help="time between two checkpoints (default 5)")
    parser.add_argument("--export", type=Path, help="do not train: write the run's EMA weights to this folder")
    return parser


def lora_config(text: str) -> LoraConfig:
    rank, alpha = text.split(",")
    return LoraConfig(int(rank), float(alpha))


def overrides(**values: Any) -> dict[str, Any]:
    """Select the values that were given: the fields of a preset to replace."""
    return {name: value for name, value in values.items() if value is not None}


def cosine_schedule(step: int, steps: int, warmup: int) -> float:
    """Return the factor on learning rates: linear warm-up, then half a cosine from 1 down to 0.01."""
    fall = 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps))
    return min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * fall)


@torch.no_grad()
def update_ema(ema: nn.Module, network: nn.Module, decay: float, step: int) -> None:
    """Move an exponential moving average of weights. Early steps decay faster, so that initial weights fade."""
    decay = min(decay, (step + 1) / (step + 10))
    for mine, theirs in zip(ema.parameters(), network.parameters(), strict=True):
        if theirs.requires_grad:
            mine.add_(theirs - mine, alpha=1 - decay)


def run_program(run: TrainingRun, flags: Namespace) -> None:
    """Resume or start a run as the command line asks: export it, or train it."""
    restore(run.parts, run.progress, flags.out)
    if flags.export:
        export(run.ema.network, run.config, run.recipe.lora, flags.export, run.strategy, flags.start)
    else:
        train(run, flags.data, flags.out, Limits(flags.minutes, flags.save_minutes))
    leave(run.strategy)


def train(run: TrainingRun, data: Path, out: Path, limits: Limits) -> None:
    """Train until the last step, the time limit, or SIGTERM. Clips that arrive meanwhile join at checkpoints."""
    strategy, progress = run.strategy, run.progress
    out.mkdir(parents=True, exist_ok=True)
    folder = SplitFolder(data, "train")
    shards, held_out = strategy.broadcast(lambda: (folder.read_new(), read_clips(data, "held_out")))
    clips = folder.add(shards)
    progress.num_clips = progress.num_clips or len(clips)
    start = time.monotonic()
    deadline, save_at, num_saved = start + 60 * limits.minutes, start + 60 * limits.save_minutes, 0
    is_over = progress.step >= run.steps
    with RunLog(run, out) as log, sigterm_flag() as is_terminated:
        while not is_over:
            log.add_step(run.advance(clips[: progress.num_clips]))
            now = time.monotonic()
            # Clocks and signals differ between processes, and all processes take part in a checkpoint.
            is_stopped, is_late, is_due = strategy.any_of(is_terminated(), now >= deadline, now >= save_at)
            is_over = is_stopped or is_late or progress.step >= run.steps
            if is_over or is_due:
                clips = folder.add(strategy.broadcast(folder.read_new))
                progress.num_clips = len(clips)
                save(run.parts, progress, out, strategy)
                if not is_stopped:
                    log.add_checkpoint(held_out, with_preview=num_saved % PREVIEW_INTERVAL == 0)
                num_saved, save_at = num_saved + 1, time.monotonic() + 60 * limits.save_minutes


@contextmanager
def sigterm_flag() -> Iterator[Callable[[], bool]]:
    """Yield a function that says if SIGTERM was received; clusters send it before they take a machine away."""
    received = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        yield received.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


class RunLog:
    """The log, plots and previews of a run. The first process writes; all take part, because networks can be shards."""

    def __init__(self, run: TrainingRun, out: Path) -> None:
        self._run, self._out = run, out
        self._values: dict[str, list[float]] = {}
        self._is_first = run.strategy.is_first
        step = run.progress.step
        self._bar = tqdm(total=run.steps, initial=step, unit="step", mininterval=20, disable=not self._is_first)
        self._board = SummaryWriter(str(out), purge_step=step) if self._is_first else None
        if self._is_first:
            (out / "recipe.json").write_text(json.dumps(asdict(run.recipe), indent=2) + "\n")

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._board:
            self._board.close()

    def add_step(self, metrics: Mapping[str, float]) -> None:
        """Log a step's metrics, which are of this process's clips."""
        for name, value in metrics.items():
            self._values.setdefault(name, []).append(value)
        self._to_board(metrics)
        self._bar.update()

    def add_checkpoint(self, held_out: Sequence[StoredClip], with_preview: bool) -> None:
        """Log the means since the last checkpoint over all processes, the validation metrics, and a preview."""
        run = self._run
        means = {name: sum(values) / len(values) for name, values in self._values.items()}
        validation = run.validate(held_out)
        entry = {**asdict(run.progress), **run.strategy.mean({**means, **validation})}
        self._values = {}
        rows = run.preview(held_out) if with_preview else []
        if not self._is_first:
            return
        losses = [name for name in entry if "loss" in name or "held_out" in name]
        write_log(self._out, entry, {"loss": losses})
        self._to_board({name: entry[name] for name in validation})
        if rows:
            save_sheet(self._out / "sheet.png", rows)

    def _to_board(self, metrics: Mapping[str, float]) -> None:
        if self._board:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, self._run.progress.step)


def write_log(out: Path, entry: Mapping[str, float], plots: Mapping[str, Sequence[str]]) -> None:
    """Append an entry to out/log.jsonl and draw each plot's metrics over all entries to PLOT.png."""
    path = out / "log.jsonl"
    with path.open("a") as file:
        file.write(json.dumps({name: round(value, 5) for name, value in entry.items()}) + "\n")
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    for plot, names in plots.items():
        save_plot(out / f"{plot}.png", {name: [(e["step"], e[name]) for e in entries if name in e] for name in names})
