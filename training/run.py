"""A training run: what is kept of it between two programs, and the loop that both stages share.

state.pt     everything that decides what comes next; written beside and renamed
log.jsonl    an entry for each checkpoint, drawn in loss.png
recipe.json  what decides the run
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from training.data import StoredClip, read_clips
from training.sheets import save_plot


class Trainee(Protocol):
    """What `go_on` trains.

    recipe: a dataclass. steps: of the whole run. progress: how far it is. parts: everything with a state.
    """

    recipe: Any
    steps: int
    progress: "Progress"
    parts: dict[str, nn.Module | Optimizer]

    def advance(self, clips: Sequence[StoredClip]) -> dict[str, float]:
        """One step; returns figures for the log."""

    def watch(self, held_out: Sequence[StoredClip], out: Path) -> dict[str, float]:
        """Figures on clips that training never sees; may write sheets to `out`."""


@dataclass
class Progress:
    """How far a run is, and how many of the clips it knows."""

    step: int = 0
    num_clips: int = 0


@dataclass(frozen=True)
class Limits:
    """When a program ends, and how often it keeps its work, in minutes."""

    minutes: float
    save_minutes: float


def cosine(step: int, steps: int, warmup: int) -> float:
    """What rates are multiplied by: up in a line, then down along half a cosine to a hundredth."""
    fallen = 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps))
    return min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * fallen)


@torch.no_grad()
def average_into(average: nn.Module, network: nn.Module, keep: float, step: int) -> None:
    """Move the average of weights a little; a young one moves faster, or it would remember the start for too long."""
    keep = min(keep, (step + 1) / (step + 10))
    for mine, theirs in zip(average.parameters(), network.parameters(), strict=True):
        mine.lerp_(theirs, 1 - keep)


def save(trainee: Trainee, path: Path) -> None:
    state: dict[str, Any] = {name: part.state_dict() for name, part in trainee.parts.items()}
    partial = path.with_suffix(".partial")
    torch.save({**state, **asdict(trainee.progress)}, partial)
    partial.rename(path)


def restore(trainee: Trainee, path: Path) -> None:
    """Go on as it was saved."""
    state = torch.load(path, weights_only=True)
    trainee.progress.step, trainee.progress.num_clips = state["step"], state["num_clips"]
    for name, part in trainee.parts.items():
        part.load_state_dict(state[name])


def go_on(trainee: Trainee, data: Path, out: Path, limits: Limits) -> None:
    """Train until the last step or the time is up; clips that arrive meanwhile join at checkpoints."""
    out.mkdir(parents=True, exist_ok=True)
    clips, held_out = read_clips(data, "train"), read_clips(data, "held_out")
    progress = trainee.progress
    progress.num_clips = progress.num_clips or len(clips)
    (out / "recipe.json").write_text(json.dumps(asdict(trainee.recipe), indent=2) + "\n")
    started = kept = time.monotonic()
    sums: dict[str, list[float]] = {}
    with tqdm(total=trainee.steps, initial=progress.step, unit="step", mininterval=20) as bar:
        while progress.step < trainee.steps and (kept - started) / 60 < limits.minutes:
            for name, value in trainee.advance(clips[: progress.num_clips]).items():
                sums.setdefault(name, []).append(value)
            bar.update()
            now = time.monotonic()
            is_over = progress.step == trainee.steps or (now - started) / 60 >= limits.minutes
            if is_over or (now - kept) / 60 >= limits.save_minutes:
                clips = read_clips(data, "train")
                progress.num_clips = len(clips)
                save(trainee, out / "state.pt")
                means = {name: sum(values) / len(values) for name, values in sums.items()}
                note(out, {**asdict(progress), **means, **trainee.watch(held_out, out)})
                sums, kept = {}, now if is_over else time.monotonic()


def note(out: Path, entry: Mapping[str, float]) -> None:
    """Add an entry to the run's log, and draw its curves."""
    path = out / "log.jsonl"
    with path.open("a") as file:
        file.write(json.dumps({name: round(value, 5) for name, value in entry.items()}) + "\n")
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    names = [name for name in entries[-1] if "loss" in name or "held_out" in name]
    save_plot(out / "loss.png", {name: [(e["step"], e[name]) for e in entries if name in e] for name in names})
