"""A training run: what is kept of it between two programs, and the loop that both stages share.

state/STEP   everything that decides what comes next, as torch.distributed.checkpoint keeps it: each process its shards
log.jsonl    an entry for each checkpoint, drawn in loss.png
events.*     every step, for TensorBoard
sheet.png    held-out clips above what the network makes of them, where a codec is given
recipe.json  what decides the run
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
from training.data import StoredClip, read_clips
from training.eval.contact_sheets import save_plot, save_sheet
from training.lora import AdapterRule
from training.strategy import STRATEGIES, Spread, Strategy, leave

# Checkpoints from one sheet to the next.
SHEET_EVERY = 4


class Trainee(Protocol):
    """What `go_on` trains.

    recipe: a dataclass. steps: of the whole run. progress: how far it is. parts: everything with a state. average: the
    network that is looked at and exported.
    """

    recipe: Any
    steps: int
    strategy: Strategy
    progress: Progress
    parts: Parts
    average: Spread
    config: NetworkConfig

    def advance(self, clips: Sequence[StoredClip]) -> dict[str, float]:
        """One step; returns figures for the log."""

    def watch(self, held_out: Sequence[StoredClip]) -> dict[str, float]:
        """Figures on clips that training never sees."""

    def sheet(self, held_out: Sequence[StoredClip]) -> list[Tensor]:
        """Rows of frames, each (pictures, 3, h, w): clips that training never sees, and what the network makes of
        them; none without a codec to see them with."""


@dataclass(frozen=True)
class Limits:
    """When a program ends, and how often it keeps its work, in minutes."""

    minutes: float
    save_minutes: float


def arguments(module: str, doc: str, steps: str) -> ArgumentParser:
    """What both stages are told when they are started; steps: of what the run counts."""
    parser = ArgumentParser(prog=f"python -m {module}", description=doc.split(":")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of shards, as training.prepare makes it")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run: state, log, sheets")
    parser.add_argument("--preset", choices=("tiny", "base"), default="tiny", help="recipe, and what is trained")
    parser.add_argument("--steps", type=int, help=f"length of the whole run, {steps}")
    parser.add_argument("--batch", type=int, help="clips of a step, of all processes together")
    parser.add_argument("--strategy", choices=STRATEGIES, default="single", help="the others are started by torchrun")
    parser.add_argument("--adapter", type=adapter_rule, help="RANK,ALPHA: train a low-rank adapter, not the weights")
    parser.add_argument("--vae", type=Path, help="a checkpoint's vae folder, to draw sheets with")
    parser.add_argument("--minutes", type=float, default=60, help="stop after this long; the next call goes on")
    parser.add_argument("--save-minutes", type=float, default=5, help="between two checkpoints")
    parser.add_argument("--export", type=Path, help="train nothing: write the run's weights to this folder")
    return parser


def adapter_rule(text: str) -> AdapterRule:
    rank, alpha = text.split(",")
    return AdapterRule(int(rank), float(alpha))


def chosen(flags: Namespace, *names: str) -> dict[str, Any]:
    """The flags of these names that were given: what replaces the fields of a preset."""
    return {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}


def cosine(step: int, steps: int, warmup: int) -> float:
    """What rates are multiplied by: up in a line, then down along half a cosine to a hundredth."""
    fallen = 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps))
    return min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * fallen)


@torch.no_grad()
def average_into(average: nn.Module, network: nn.Module, keep: float, step: int) -> None:
    """Move the average of weights a little; a young one moves faster, or it would remember the start for too long."""
    keep = min(keep, (step + 1) / (step + 10))
    for mine, theirs in zip(average.parameters(), network.parameters(), strict=True):
        if theirs.requires_grad:
            mine.add_(theirs - mine, alpha=1 - keep)


def carry_out(trainee: Trainee, flags: Namespace) -> None:
    """What the command line asks of a run that is new or was kept: to be trained on, or to be exported."""
    restore(trainee.parts, trainee.progress, flags.out)
    if flags.export:
        export(trainee.average.network, trainee.config, trainee.recipe.adapter, flags.export, trainee.strategy)
    else:
        go_on(trainee, flags.data, flags.out, Limits(flags.minutes, flags.save_minutes))
    leave(trainee.strategy)


def go_on(trainee: Trainee, data: Path, out: Path, limits: Limits) -> None:
    """Train until the last step, the time is up, or SIGTERM; clips that arrive meanwhile join at checkpoints."""
    strategy, progress = trainee.strategy, trainee.progress
    out.mkdir(parents=True, exist_ok=True)
    clips, held_out = strategy.from_first(lambda: (read_clips(data, "train"), read_clips(data, "held_out")))
    progress.num_clips = progress.num_clips or len(clips)
    begun = time.monotonic()
    deadline, save_at, num_saved = begun + 60 * limits.minutes, begun + 60 * limits.save_minutes, 0
    is_over = progress.step >= trainee.steps
    with Journal(trainee, out) as journal, asked_to_stop() as is_asked:
        while not is_over:
            journal.note(trainee.advance(clips[: progress.num_clips]))
            now = time.monotonic()
            # Clocks and signals differ between processes, and a checkpoint takes all of them.
            is_stopped, is_late, is_due = strategy.agree(is_asked(), now >= deadline, now >= save_at)
            is_over = is_stopped or is_late or progress.step >= trainee.steps
            if is_over or is_due:
                clips = strategy.from_first(lambda: read_clips(data, "train"))
                progress.num_clips = len(clips)
                save(trainee.parts, progress, out, strategy)
                if not is_stopped:
                    journal.sum_up(held_out, with_sheet=num_saved % SHEET_EVERY == 0)
                num_saved, save_at = num_saved + 1, time.monotonic() + 60 * limits.save_minutes


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM has come, which clusters send before they take a machine away."""
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


class Journal:
    """What a run tells while it trains. The first process writes; all take part, since networks may be in shards."""

    def __init__(self, trainee: Trainee, out: Path) -> None:
        self._trainee, self._out = trainee, out
        self._sums: dict[str, list[float]] = {}
        self._is_first = trainee.strategy.is_first
        step = trainee.progress.step
        self._bar = tqdm(total=trainee.steps, initial=step, unit="step", mininterval=20, disable=not self._is_first)
        self._board = SummaryWriter(str(out), purge_step=step) if self._is_first else None
        if self._is_first:
            (out / "recipe.json").write_text(json.dumps(asdict(trainee.recipe), indent=2) + "\n")

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._board:
            self._board.close()

    def note(self, figures: Mapping[str, float]) -> None:
        """Figures of a step, of this process's clips."""
        for name, value in figures.items():
            self._sums.setdefault(name, []).append(value)
        self._show(figures)
        self._bar.update()

    def sum_up(self, held_out: Sequence[StoredClip], with_sheet: bool) -> None:
        """An entry for the steps since the last one, of all processes, with figures on held-out clips, and a sheet."""
        trainee = self._trainee
        means = {name: sum(values) / len(values) for name, values in self._sums.items()}
        watched = trainee.watch(held_out)
        entry = {**asdict(trainee.progress), **trainee.strategy.mean({**means, **watched})}
        self._sums = {}
        sheet = trainee.sheet(held_out) if with_sheet else []
        if not self._is_first:
            return
        write_entry(self._out, entry)
        self._show({name: entry[name] for name in watched})
        if sheet:
            save_sheet(self._out / "sheet.png", sheet)

    def _show(self, figures: Mapping[str, float]) -> None:
        if self._board:
            for name, value in figures.items():
                self._board.add_scalar(name, value, self._trainee.progress.step)


def write_entry(out: Path, entry: Mapping[str, float]) -> None:
    """Add an entry to the run's log, and draw its curves."""
    path = out / "log.jsonl"
    with path.open("a") as file:
        file.write(json.dumps({name: round(value, 5) for name, value in entry.items()}) + "\n")
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    names = [name for name in entries[-1] if "loss" in name or "held_out" in name]
    save_plot(out / "loss.png", {name: [(e["step"], e[name]) for e in entries if name in e] for name in names})
