"""Two processes that train together for test_strategy and test_base, and what they do."""

import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn
from torch.multiprocessing.spawn import start_processes
from torch.optim import Optimizer

from avatar.checkpoints.part import Part
from avatar.denoiser.model import load
from tests.training.small import RULE, begin, small, small_base
from training import distill, pretrain
from training.checkpointing import export, restore, save
from training.data import StoredClip, read_clips
from training.distill import Distillation
from training.distill import Recipe as DistillRecipe
from training.lora import AdapterRule
from training.pretrain import Pretraining
from training.pretrain import Recipe as PretrainRecipe
from training.strategy import Strategy, grouped

Task = Callable[[Strategy, Sequence[StoredClip], Path], dict[str, Any]]

# Neither Muon, which FSDP2 has no use for, nor bfloat16, whose sums depend on their order.
PRETRAIN = PretrainRecipe(steps=6, warmup=2, matrix_rate=0.0, batches=RULE)
DISTILL = DistillRecipe(steps=6, ratio=2, batches=replace(RULE, together=True))


class Watched(Distillation):
    """Keeps the exit levels that it draws."""

    def exit_level(self, draws: Generator) -> int:
        level = super().exit_level(draws)
        self.levels = [*getattr(self, "levels", []), level]
        return level


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def gradients_into(found: list[Tensor], optimiser: Optimizer) -> None:
    """Keep the gradients of every step of an optimiser."""

    def keep(*_: Any) -> None:
        for group in optimiser.param_groups:
            found.extend(whole(each.grad) for each in group["params"] if each.grad is not None)

    optimiser.register_step_pre_hook(keep)


def trained(strategy: Strategy, clips: Sequence[StoredClip]) -> dict[str, Any]:
    """Gradients of a few steps of both stages, and how far the loss was from what one process has."""
    results: dict[str, Any] = {}
    pretraining = Pretraining(PRETRAIN, begin(small()), strategy)
    gradients_into(results.setdefault("stage 1", []), pretraining.optimisers["adamw"])
    losses = [pretraining.advance(clips) for _ in range(2)]
    results["loss"] = strategy.mean(losses[-1])["loss"]
    for name, is_blockwise in (("stage 2", False), ("stage 2 by block", True)):
        distillation = Watched(replace(DISTILL, blockwise=is_blockwise), begin(small()), None, strategy)
        gradients_into(results.setdefault(name, []), distillation.moves)
        gradients_into(results.setdefault(f"{name}: critic", []), distillation.critic_moves)
        for _ in range(2):
            distillation.advance(clips)
        results["levels"] = distillation.levels
        results[f"{name}: average"] = [whole(each) for each in distillation.average.network.parameters()]
    return results


def state_of(run: Distillation) -> list[Tensor]:
    """Everything that decides how a run goes on, as far as this process has it."""
    modules = [part for part in run.parts.values() if isinstance(part, nn.Module)]
    weights = [each for module in modules for each in module.parameters()]
    states = [
        state for part in (run.moves, run.critic_moves) for _, state in sorted(part.state_dict()["state"].items())
    ]
    moments = [state[name] for state in states for name in ("step", "exp_avg", "exp_avg_sq")]
    return [whole(each) for each in (*weights, *moments)]


def goes_on(strategy: Strategy, clips: Sequence[StoredClip], out: Path) -> bool:
    """Whether a run that was stopped and taken up again ends with the bytes of one that was not."""
    through, again = (Distillation(DISTILL, begin(small()), None, strategy) for _ in range(2))
    for step in range(4):
        if step == 2:
            save(through.parts, through.progress, out, strategy)
        through.advance(clips)
    restore(again.parts, again.progress, out)
    for _ in range(2):
        again.advance(clips)
    return all(torch.equal(a, b) for a, b in zip(state_of(through), state_of(again), strict=True))


def begins_base(strategy: Strategy, clips: Sequence[StoredClip], root: Path, is_thrifty: bool = True) -> dict[str, Any]:
    """The first steps of the 14B recipes: stage 1, its export, and stage 2 from there until the generator moved.

    is_thrifty: with what they do to save memory.
    """
    rule, results = AdapterRule(rank=4, alpha=2.0), dict[str, Any]()
    recipe = pretrain.base()
    batches = replace(recipe.batches, batch=2, num_blocks=(3, 3))
    recipe = replace(recipe, recompute=is_thrifty, warmup=1, rate=1e-2, adapter=rule, batches=batches)
    first = Pretraining(recipe, begin(small_base()), strategy)
    gradients_into(results.setdefault("stage 1", []), first.optimisers["adamw"])
    results["loss"] = [strategy.mean(first.advance(clips))["loss"] for _ in range(2)]
    export(first.spread.network, first.config, rule, root / "stage1", strategy)
    results["network"] = {name: whole(each) for name, each in first.spread.network.state_dict().items()}
    strategy.from_first(lambda: None)  # the others wait for the export

    second = distill.base()
    batches = replace(second.batches, batch=2, num_blocks=(3, 3))
    second = replace(second, recompute=is_thrifty, blockwise=is_thrifty, rate=1e-2, adapter=rule, batches=batches)
    run = Distillation(second, lambda: load(Part.read(root / "stage1"))[0], begin(small_base()), strategy)
    gradients_into(results.setdefault("stage 2", []), run.moves)
    results["figures"] = [strategy.mean(run.advance(clips)) for _ in range(second.ratio)]
    results["teacher"] = [whole(each) for each in run.teacher.network.parameters()]
    export(run.average.network, run.config, rule, root / "stage2", strategy)
    return results


def trains(strategy: Strategy, clips: Sequence[StoredClip], root: Path) -> dict[str, Any]:
    return {**trained(strategy, clips), "goes on": goes_on(strategy, clips, root)}


def of_two(task: Task, kind: str, folder: Path) -> list[dict[str, Any]]:
    """What two processes get from a task under a strategy; the clips are in folder/latents."""
    # A server that has loaded torch is forked twice; each would load it for seconds otherwise.
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__, "torch._dynamo"])
    start_processes(process, (task, kind, folder), nprocs=2, start_method="forkserver")  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"{kind}-{rank}.pt") for rank in range(2)]


def process(rank: int, task: Task, kind: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{kind}-meet", rank=rank, world_size=2)
    strategy = grouped(kind, torch.device("cpu"), torch.float32, num_local=2)
    results = task(strategy, read_clips(folder / "latents", "train"), folder / kind)
    torch.save(results, folder / f"{kind}-{rank}.pt")
    dist.destroy_process_group()
