"""Training tasks for two gloo processes, for test_strategy and test_base."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Generator, Tensor
from torch.multiprocessing.spawn import start_processes
from torch.optim import Optimizer

from avatar.checkpoints.part import Part
from avatar.denoiser.model import load
from tests.training.small import BATCHES, maker, small, small_base, tensors
from training import distill, pretrain
from training.checkpointing import export, restore, save
from training.data import StoredClip, read_clips
from training.distill import Distillation, DistillRecipe
from training.lora import LoraConfig
from training.pretrain import Pretraining, PretrainRecipe
from training.strategy import Strategy, strategy_of_group

Task = Callable[[Strategy, Sequence[StoredClip], Path], dict[str, Any]]

# Without Muon, which FSDP2 cannot use, and without bfloat16, whose sums depend on their order.
PRETRAIN = PretrainRecipe(steps=6, warmup=2, muon_lr=0.0, batches=BATCHES)
DISTILL = DistillRecipe(steps=6, update_ratio=2, batches=replace(BATCHES, same_position=True))


class RecordingDistillation(Distillation):
    """Records the exit levels that it draws."""

    def draw_exit_level(self, random: Generator) -> int:
        level = super().draw_exit_level(random)
        self.levels = [*getattr(self, "levels", []), level]
        return level


def whole(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor, gathered if it is sharded."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def record_gradients(gradients: list[Tensor], optimizer: Optimizer) -> None:
    """Append the gradients of every step of an optimizer to a list."""

    def record(*_: Any) -> None:
        for group in optimizer.param_groups:
            gradients.extend(whole(each.grad) for each in group["params"] if each.grad is not None)

    optimizer.register_step_pre_hook(record)


def train_both_stages(strategy: Strategy, clips: Sequence[StoredClip]) -> dict[str, Any]:
    """Return the gradients of two steps of both stages, and the loss of stage 1."""
    results: dict[str, Any] = {}
    pretraining = Pretraining(PRETRAIN, maker(small()), strategy)
    record_gradients(results.setdefault("stage 1", []), pretraining.optimizers["adamw"])
    losses = [pretraining.advance(clips) for _ in range(2)]
    results["loss"] = strategy.mean(losses[-1])["loss"]
    for name, is_blockwise in (("stage 2", False), ("stage 2 blockwise", True)):
        recipe = replace(DISTILL, blockwise=is_blockwise)
        distillation = RecordingDistillation(recipe, maker(small()), None, strategy)
        record_gradients(results.setdefault(name, []), distillation.optimizer)
        record_gradients(results.setdefault(f"{name}: critic", []), distillation.critic_optimizer)
        for _ in range(2):
            distillation.advance(clips)
        results["levels"] = distillation.levels
        results[f"{name}: ema"] = [whole(each) for each in distillation.ema.network.parameters()]
    return results


def resumes(strategy: Strategy, clips: Sequence[StoredClip], out: Path) -> bool:
    """Return true if a stopped and resumed run ends with the bytes of an uninterrupted one."""
    uninterrupted, resumed = (Distillation(DISTILL, maker(small()), None, strategy) for _ in range(2))
    for step in range(4):
        if step == 2:
            save(uninterrupted.parts, uninterrupted.progress, out, strategy)
        uninterrupted.advance(clips)
    restore(resumed.parts, resumed.progress, out)
    for _ in range(2):
        resumed.advance(clips)
    states = [tensors([part.state_dict() for part in run.parts.values()]) for run in (uninterrupted, resumed)]
    return all(torch.equal(whole(a), whole(b)) for a, b in zip(*states, strict=True))


def start_base(
    strategy: Strategy, clips: Sequence[StoredClip], root: Path, saves_memory: bool = True
) -> dict[str, Any]:
    """Take the first steps of the 14B recipes: stage 1, its export, and stage 2 until the generator's first step.

    saves_memory: with the recipes' activation checkpointing and blockwise accumulation.
    """
    lora, results = LoraConfig(rank=4, alpha=2.0), dict[str, Any]()
    recipe = pretrain.base()
    batches = replace(recipe.batches, batch_size=2, num_blocks=(3, 3))
    recipe = replace(recipe, checkpoint_activations=saves_memory, warmup=1, lr=1e-2, lora=lora, batches=batches)
    first = Pretraining(recipe, maker(small_base()), strategy)
    record_gradients(results.setdefault("stage 1", []), first.optimizers["adamw"])
    results["loss"] = [strategy.mean(first.advance(clips))["loss"] for _ in range(2)]
    export(first.wrapped.network, first.config, lora, root / "stage1", strategy)
    results["network"] = {name: whole(each) for name, each in first.wrapped.network.state_dict().items()}
    strategy.broadcast(lambda: None)  # the others wait for the export

    second = distill.base()
    batches = replace(second.batches, batch_size=2, num_blocks=(3, 3))
    second = replace(second, lr=1e-2, lora=lora, batches=batches)
    second = replace(second, checkpoint_activations=saves_memory, blockwise=saves_memory)
    run = Distillation(second, lambda: load(Part.read(root / "stage1")), maker(small_base()), strategy)
    record_gradients(results.setdefault("stage 2", []), run.optimizer)
    results["metrics"] = [strategy.mean(run.advance(clips)) for _ in range(second.update_ratio)]
    results["teacher"] = [whole(each) for each in run.teacher.network.parameters()]
    export(run.ema.network, run.config, lora, root / "stage2", strategy)
    return results


def train_and_resume(strategy: Strategy, clips: Sequence[StoredClip], root: Path) -> dict[str, Any]:
    return {**train_both_stages(strategy, clips), "resumes": resumes(strategy, clips, root)}


def run_on_two(
    task: Task, kind: str, latents: Path, folder: Path, precision: torch.dtype = torch.float32
) -> list[dict[str, Any]]:
    """Run a task on two processes under a strategy and return their results. precision: as of the strategy."""
    arguments = (task, kind, latents, folder, precision)
    start_processes(process, arguments, nprocs=2, start_method="forkserver")  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"{kind}-{rank}.pt") for rank in range(2)]


def process(rank: int, task: Task, kind: str, latents: Path, folder: Path, precision: torch.dtype) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{kind}-rendezvous", rank=rank, world_size=2)
    strategy = strategy_of_group(kind, torch.device("cpu"), precision, num_local=2)
    results = task(strategy, read_clips(latents, "train"), folder / kind)
    torch.save(results, folder / f"{kind}-{rank}.pt")
    dist.destroy_process_group()
