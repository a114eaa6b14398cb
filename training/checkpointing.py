"""What is kept of a training run: its state, complete or not there, and the checkpoint that it is for.

The state is torch.distributed.checkpoint's: each process writes its shards, and any number of processes can read them.
"""

import shutil
import warnings
from collections.abc import Mapping
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
from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.model import Network
from training.lora import AdapterRule, adapter_of, merged
from training.strategy import Strategy

# Everything of a run that has a state.
Parts = Mapping[str, nn.Module | Optimizer]


@dataclass
class Progress:
    """How far a run is, and how many of the clips it knows."""

    step: int = 0
    num_clips: int = 0


def save(parts: Parts, progress: Progress, out: Path, strategy: Strategy) -> None:
    """Keep a run as it is in out/state/STEP; what was kept before goes when that is complete."""
    path = out / "state" / f"{progress.step:08d}"
    state = {name: part.state_dict() for name, part in parts.items()}
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # a single process is told that it is one
        save_shards({**state, "progress": asdict(progress)}, checkpoint_id=path)
    if strategy.is_first:
        for other in path.parent.iterdir():
            if other != path:
                shutil.rmtree(other)


def kept(out: Path) -> Path | None:
    """The state to go on from: the newest that was written to its end, since its metadata comes last."""
    paths = sorted((out / "state").glob("*/.metadata"))
    if paths:
        return paths[-1].parent
    # One file, as runs had it before they could be spread.
    return out / "state.pt" if (out / "state.pt").exists() else None


def restore(parts: Parts, progress: Progress, out: Path) -> None:
    """Go on as it was kept, if it was."""
    path = kept(out)
    if path is None:
        return
    state = read_file(path) if path.suffix else read_shards(path, parts)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    progress.step, progress.num_clips = state["progress"]["step"], state["progress"]["num_clips"]


def read_file(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return {**state, "progress": {"step": state["step"], "num_clips": state["num_clips"]}}


def read_shards(path: Path, parts: Parts) -> dict[str, Any]:
    saved = FileSystemReader(path).read_metadata().state_dict_metadata
    state = {name: room_for(part, f"{name}.state.", saved) for name, part in parts.items()}
    state["progress"] = asdict(Progress())
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        load_shards(state, checkpoint_id=path)
    return state


def room_for(part: nn.Module | Optimizer, prefix: str, saved: Mapping[str, Any]) -> dict[str, Any]:
    """A state for a checkpoint to be read into: tensors are read in place.

    An optimiser has none before its first step, and afterwards only for parameters that had gradients: the checkpoint
    knows. prefix: of the names of an optimiser's tensors in it.
    """
    state = part.state_dict()
    if isinstance(part, Optimizer):
        parameters = [parameter for group in part.param_groups for parameter in group["params"]]
        for name in (name for name in saved if name.startswith(prefix)):
            index, field = name.removeprefix(prefix).split(".")
            like: Tensor = parameters[int(index)]
            size = saved[name].size
            room = torch.zeros_like(like) if size == like.shape else torch.zeros(size)
            state["state"].setdefault(int(index), {})[field] = room
    return state


def export(network: Network, config: NetworkConfig, rule: AdapterRule | None, folder: Path, strategy: Strategy) -> None:
    """Write a network as a checkpoint's denoiser folder: float16, or bfloat16 where the public weights are so.

    An adapter is merged, and written by itself as adapter.safetensors too.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(network, options=options)
    if not strategy.is_first:
        return
    with torch.device("meta"):
        plain = Network(config)
    plain.load_state_dict(merged(state, rule) if rule else state, assign=True)
    dtype = torch.float16 if config.output == "x0_residual" else torch.bfloat16
    files.save(folder, config.to_dict(), plain, dtype)
    if rule:
        save_file(adapter_of(state), folder / "adapter.safetensors")
