"""Checkpoints of a training run, and the export of its network as a denoiser folder.

A run's state is kept with torch.distributed.checkpoint: each process writes its shards, and any number of processes can
read them.
"""

import hashlib
import shutil
import warnings
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.optim import Optimizer

from avatar.checkpoints import files
from avatar.checkpoints.lora import BASE
from avatar.checkpoints.part import MERGED, Part
from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.model import Network
from training.lora import LoraConfig, lora_state, merge_lora
from training.strategy import Strategy

# The networks and optimizers of a run, by their name in checkpoints.
Parts = Mapping[str, nn.Module | Optimizer]


@dataclass
class Progress:
    """Progress of a run: optimizer steps done, and the number of training clips it uses."""

    step: int = 0
    num_clips: int = 0


def frozen_names(parts: Parts) -> set[str]:
    """Return the names of weights that no network of a run trains: of a base under an adapter.

    An EMA trains nothing itself and has the names of the network that it follows.
    """
    networks = [part for part in parts.values() if isinstance(part, nn.Module)]
    named = [pair for network in networks for pair in network.named_parameters()]
    return {name for name, _ in named} - {name for name, weight in named if weight.requires_grad}


def kept_state(part: nn.Module | Optimizer, frozen: Collection[str]) -> dict[str, Any]:
    """Return a part's state without frozen weights, with which a run starts in any case."""
    state: dict[str, Any] = part.state_dict()
    return {name: value for name, value in state.items() if name not in frozen}


def save(parts: Parts, progress: Progress, out: Path, strategy: Strategy) -> None:
    """Write what the run trains to out/state/STEP, then delete older states."""
    path, frozen = out / "state" / f"{progress.step:08d}", frozen_names(parts)
    state = {name: kept_state(part, frozen) for name, part in parts.items()}
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # it warns if there is one process only
        save_shards({**state, "progress": asdict(progress)}, checkpoint_id=path)
    if strategy.is_first:
        for other in path.parent.iterdir():
            if other != path:
                shutil.rmtree(other)


def latest(out: Path) -> Path | None:
    """Return the path of the newest complete state, or None. A state's metadata file is written last."""
    paths = sorted((out / "state").glob("*/.metadata"))
    if paths:
        return paths[-1].parent
    # The format of runs from before distributed checkpoints: one file.
    return out / "state.pt" if (out / "state.pt").exists() else None


def restore(parts: Parts, progress: Progress, out: Path) -> None:
    """Load the newest state of a run in place, if there is one."""
    path = latest(out)
    if path is None:
        return
    state = read_file(path) if path.suffix else read_shards(path, parts)
    frozen = frozen_names(parts)
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            missing, unexpected = part.load_state_dict(state[name], strict=False)
            if unexpected or not frozen.issuperset(missing):
                raise ValueError(f"the state in {path} is of another run: {name} lacks {missing}, has {unexpected}")
        else:
            part.load_state_dict(state[name])
    progress.step, progress.num_clips = state["progress"]["step"], state["progress"]["num_clips"]


def read_file(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return {**state, "progress": {"step": state["step"], "num_clips": state["num_clips"]}}


def read_shards(path: Path, parts: Parts) -> dict[str, Any]:
    saved = FileSystemReader(path).read_metadata().state_dict_metadata
    frozen = frozen_names(parts)
    state = {name: state_to_fill(part, f"{name}.state.", saved, frozen) for name, part in parts.items()}
    state["progress"] = asdict(Progress())
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        load_shards(state, checkpoint_id=path)
    return state


def state_to_fill(
    part: nn.Module | Optimizer, prefix: str, saved: Mapping[str, Any], frozen: Collection[str]
) -> dict[str, Any]:
    """Return a state dict with a tensor for each one of the checkpoint, because tensors are read in place.

    An optimizer has no state before its first step, and afterwards only for parameters that had gradients; the
    checkpoint's metadata says which. prefix: of the optimizer's tensor names there.
    """
    state = kept_state(part, frozen)
    if isinstance(part, Optimizer):
        parameters = [parameter for group in part.param_groups for parameter in group["params"]]
        for name in (name for name in saved if name.startswith(prefix)):
            index, field = name.removeprefix(prefix).split(".")
            like: Tensor = parameters[int(index)]
            size = saved[name].size
            empty = torch.zeros_like(like) if size == like.shape else torch.zeros(size)
            state["state"].setdefault(int(index), {})[field] = empty
    return state


def export(
    network: Network,
    config: NetworkConfig,
    lora: LoraConfig | None,
    folder: Path,
    strategy: Strategy,
    start: Path | None = None,
) -> None:
    """Write a network as a denoiser folder: float16, or bfloat16 for the public network's kind.

    A LoRA adapter is merged, and also written by itself as adapter.safetensors. start: the folder that the run started
    from; if its weights were merged with an adapter, this one fits no others, and says so.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(network, options=options)
    if not strategy.is_first:
        return
    with torch.device("meta"):
        plain = Network(config)
    plain.load_state_dict(merge_lora(state, lora) if lora else state, assign=True)
    dtype = torch.float16 if config.output == "x0_residual" else torch.bfloat16
    if lora is None:
        files.save(folder, config.to_dict(), plain, dtype)
        return
    adapter, base = folder / "adapter.safetensors", Part.read(start).merged_adapter() if start else None
    folder.mkdir(parents=True, exist_ok=True)
    save_file(lora_state(state), adapter, {BASE: base} if base else None)
    with adapter.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    files.save(folder, config.to_dict(), plain, dtype, {MERGED: f"adapter {digest}"})
