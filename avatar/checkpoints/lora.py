"""LoRA adapters: two low-rank matrices A and B for each weight W that they change, merged when weights are loaded.

    W + alpha / rank * B A

Product and sum are computed in float32, whatever the files hold, and rounded once, when the sum is stored. Rounding the
product first would change a tenth to a quarter of a bfloat16 checkpoint's numbers.

Source: LoRA (arXiv 2106.09685). Axes: r rank, i inputs, o outputs.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from avatar.checkpoints import peft_config
from avatar.checkpoints.files import read_metadata, read_tensors
from avatar.checkpoints.peft_config import PeftConfig

# PEFT's keys, with or without its prefix and the adapter's name.
KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
# The weights that Live Avatar's adapter changes: attention projections and the feed-forward network.
TARGET = re.compile(r"(^|\.)([qkvo]|ffn\.[02])\.weight$")
# Live Avatar's file has rank 128 and does not contain alpha. Source: the configuration of its training.
ALPHA = 64.0
# Key of a file's metadata that names the adapter which its base had been merged with before it was trained.
BASE = "base_adapter"
# Problems listed in an error message.
MAX_LISTED = 5

Pairs = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class LoraAdapter:
    """A LoRA adapter: a file of matrices, or the folder of one that PEFT saved.

    alpha: that a file was trained with; None: ALPHA. A folder states its own, in its adapter_config.json.
    """

    path: Path
    alpha: float | None = None

    @cached_property
    def peft(self) -> PeftConfig | None:
        """The configuration of a folder, or beside one of PEFT's files; None for other files.

        ValueError if it is missing or not supported, or there is another alpha.
        """
        folder = self.path.parent if self.path.name in peft_config.WEIGHTS else self.path
        config = folder / peft_config.CONFIG
        if not self.path.exists():
            raise ValueError(f"no LoRA adapter at {self.path}: expected a file, or a folder that PEFT saved")
        if not config.is_file():
            if self.path.is_dir():
                inner = sorted(self.path.glob(f"*/{peft_config.CONFIG}"))
                hint = f"did you mean {inner[0].parent}?" if inner else "PEFT's save_pretrained writes it"
                raise ValueError(f"no LoRA adapter in {self.path}: {config} is missing; {hint}")
            return None
        if self.alpha is not None:
            raise ValueError(f"alpha of the adapter {self.path} is in {config}; leave out another one")
        return PeftConfig.read(config)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that decide its numbers, the one of the matrices first. ValueError if one is missing."""
        if self.peft is None:
            return (self.path,)
        folder = self.peft.path.parent
        for name in peft_config.WEIGHTS:
            if (folder / name).exists():
                return (folder / name, self.peft.path)
        raise ValueError(f"no LoRA adapter in {folder}: {folder / peft_config.WEIGHTS[0]} is missing")

    @property
    def base(self) -> str | None:
        """The name of the adapter that the weights were merged with on which this one was trained; None: of none."""
        return read_metadata(self.files[0]).get(BASE)

    @property
    def name(self) -> str:
        """The name of its file or folder."""
        return self.path.resolve().name

    @property
    def file_alpha(self) -> float:
        """Alpha of an adapter without a configuration."""
        return ALPHA if self.alpha is None else self.alpha

    def scale(self, name: str, rank: int) -> float:
        """Return the factor of the product B A, of this rank, for the weight of this name."""
        return self.file_alpha / rank if self.peft is None else self.peft.scale_of(module_of(name))

    def pairs(self) -> Pairs:
        """Return matrices "A" (r, i) and "B" (o, r) by the name of the weight that they change, memory-mapped.

        ValueError lists keys that are not LoRA matrices: such a file means to replace whole weights.
        """
        pairs: Pairs = {}
        foreign: list[str] = []
        path = self.files[0]
        for key, tensor in read_tensors(path):
            found = KEY.fullmatch(key)
            pair = pairs.setdefault(f"{found['module']}.weight", {}) if found else {}
            if found is None or found["side"] in pair:
                foreign.append(key)
            else:
                pair[found["side"]] = tensor
        if foreign:
            raise ValueError(f"{path} is no LoRA adapter: it holds {first_few(foreign)}")
        return pairs

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless each weight (o, i) that LoRA targets has a pair of matching shapes, and nothing else.

        Matrices must have floating-point dtypes.

        A file targets TARGET. A folder targets what its configuration names, and may change any matrix.
        weights: meta tensors by name.
        """
        pairs = self.pairs()
        if self.peft is None:
            changeable = targets = {name for name in weights if TARGET.search(name)}
        else:
            changeable = {name for name in weights if name.endswith(".weight") and weights[name].ndim == 2}
            targets = {name for name in changeable if self.peft.targets_module(module_of(name))}
        problems = [f"nothing for {name}" for name in weights if name in targets and name not in pairs]
        problems += [f"a pair for {name}, which it cannot change" for name in pairs if name not in changeable]
        for name in (name for name in pairs if name in changeable):
            shapes = {side: tuple(matrix.shape) for side, matrix in pairs[name].items()}
            (outputs, inputs), rank = weights[name].shape, min(shapes.get("A", (0,)))
            if shapes != {"A": (rank, inputs), "B": (outputs, rank)} or not rank:
                problems.append(f"{name} of shape {(outputs, inputs)} has {shapes}")
            elif self.peft is not None and rank != self.peft.rank_of(module_of(name)):
                problems.append(
                    f"{name} has rank {rank}, but {self.peft.rank_of(module_of(name))} in its configuration"
                )
        problems += [
            f"{name} has {side} as {str(matrix.dtype).removeprefix('torch.')}, expected a floating-point dtype"
            for name, pair in pairs.items()
            for side, matrix in pair.items()
            if not matrix.is_floating_point()
        ]
        if not pairs:
            problems.append("it is empty")
        if problems:
            raise ValueError(f"adapter {self.path} does not match these weights: {first_few(problems)}")


def module_of(weight: str) -> str:
    """Return the name of the module that has a weight."""
    return weight.removesuffix(".weight")


def merge(weight: Tensor, pair: Mapping[str, Tensor], scale: float, device: torch.device | str = "cpu") -> Tensor:
    """Return weight (o, i) + scale * B A, float32 on the device; nothing beyond the result is allocated."""
    a, b = (pair[side].to(device, torch.float32) for side in "AB")
    return (b @ a).mul_(scale).add_(weight.to(device))


def first_few(problems: list[str]) -> str:
    """Join the first MAX_LISTED problems, and count the rest."""
    more = f" and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
    return "; ".join(problems[:MAX_LISTED]) + more
