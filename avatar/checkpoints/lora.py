"""A low-rank adapter (LoRA): for each weight W that it changes two matrices A and B, merged when weights are loaded.

    W + alpha / rank * B A

The product and the sum are float32, whatever the files hold, and whoever keeps the sum rounds it once. Rounding the
product first would change a tenth to a quarter of a bfloat16 checkpoint's numbers.

Axes: r rank, i inputs, o outputs.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from avatar.checkpoints.files import read_tensors

# PEFT's names of a pair, with or without its prefix and the adapter's name.
KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
# The weights that Live Avatar's adapter changes: of attention and of the feed-forward network.
TARGET = re.compile(r"(^|\.)([qkvo]|ffn\.[02])\.weight$")
# Live Avatar's file has a rank of 128, and says nothing of alpha. Source: the configuration of its training.
ALPHA = 64.0
# Problems that a message names.
FEW = 5

Pairs = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class LoraAdapter:
    """A file of adapter matrices, and the alpha that it was trained with."""

    path: Path
    alpha: float = ALPHA

    def pairs(self) -> Pairs:
        """Matrices "A" (r, i) and "B" (o, r) by the name of the weight that they change, mapped and not read.

        ValueError names the keys that are not an adapter's: they would replace weights.
        """
        pairs: Pairs = {}
        foreign: list[str] = []
        for key, tensor in read_tensors(self.path):
            found = KEY.fullmatch(key)
            pair = pairs.setdefault(f"{found['module']}.weight", {}) if found else {}
            if found is None or found["side"] in pair:
                foreign.append(key)
            else:
                pair[found["side"]] = tensor
        if foreign:
            raise ValueError(f"{self.path} is no adapter: it holds {first_few(foreign)}")
        return pairs

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """ValueError unless each weight (o, i) that an adapter changes has its pair, and no pair is left over."""
        pairs, targets = self.pairs(), {name for name in weights if TARGET.search(name)}
        problems = [f"nothing for {name}" for name in weights if name in targets and name not in pairs]
        problems += [f"a pair for {name}, which it cannot change" for name in pairs if name not in targets]
        for name in (name for name in pairs if name in targets):
            shapes = {side: tuple(matrix.shape) for side, matrix in pairs[name].items()}
            (outputs, inputs), rank = weights[name].shape, min(shapes.get("A", (0,)))
            if shapes != {"A": (rank, inputs), "B": (outputs, rank)} or not rank:
                problems.append(f"{name} of shape {(outputs, inputs)} has {shapes}")
        if problems:
            raise ValueError(f"adapter {self.path} does not match these weights: {first_few(problems)}")


def merge(weight: Tensor, pair: Mapping[str, Tensor], alpha: float, device: torch.device | str = "cpu") -> Tensor:
    """A weight (o, i) of any dtype with its pair, float32 on the device; no more is allocated than the result."""
    a, b = (pair[side].to(device, torch.float32) for side in "AB")
    return (b @ a).mul_(alpha / len(a)).add_(weight.to(device))


def first_few(problems: list[str]) -> str:
    """The first of what is wrong, and how much more there is."""
    more = f" and {len(problems) - FEW} more" if len(problems) > FEW else ""
    return "; ".join(problems[:FEW]) + more
