"""LoRA adapters: two low-rank matrices A and B for each weight W that they change, merged when weights are loaded.

    W + alpha / rank * B A

Product and sum are computed in float32, whatever the files hold, and rounded once, when the sum is stored. Rounding the
product first would change a tenth to a quarter of a bfloat16 checkpoint's numbers.

Source: LoRA (arXiv 2106.09685). Axes: r rank, i inputs, o outputs.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from avatar.checkpoints.files import read_tensors

# PEFT's keys, with or without its prefix and the adapter's name.
KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
# The weights that Live Avatar's adapter changes: attention projections and the feed-forward network.
TARGET = re.compile(r"(^|\.)([qkvo]|ffn\.[02])\.weight$")
# Live Avatar's file has rank 128 and does not contain alpha. Source: the configuration of its training.
ALPHA = 64.0
# Problems listed in an error message.
MAX_LISTED = 5

Pairs = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class LoraAdapter:
    """A LoRA adapter: its file, and the alpha that it was trained with."""

    path: Path
    alpha: float = ALPHA

    def pairs(self) -> Pairs:
        """Return matrices "A" (r, i) and "B" (o, r) by the name of the weight that they change, memory-mapped.

        ValueError lists keys that are not LoRA matrices: such a file means to replace whole weights.
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
            raise ValueError(f"{self.path} is no LoRA adapter: it holds {first_few(foreign)}")
        return pairs

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless each weight (o, i) that LoRA targets has a pair of matching shapes, and nothing else.

        weights: meta tensors by name.
        """
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
    """Return weight (o, i) + alpha / r * B A, float32 on the device; nothing beyond the result is allocated."""
    a, b = (pair[side].to(device, torch.float32) for side in "AB")
    return (b @ a).mul_(alpha / len(a)).add_(weight.to(device))


def first_few(problems: list[str]) -> str:
    """Join the first MAX_LISTED problems, and count the rest."""
    more = f" and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
    return "; ".join(problems[:MAX_LISTED]) + more
