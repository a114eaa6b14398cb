"""A tiny module, and helpers that write and read its weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from avatar.checkpoints.files import weight_files
from avatar.checkpoints.part import Part


class Toy(nn.Module):
    """Nested parameters, and a buffer of integers."""

    counts: Tensor

    def __init__(self, seed: int = 0, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2, bias=False))
        self.register_buffer("counts", torch.randint(-(2**40), 2**40, (3,)))


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)


def write_shards(folder: Path, part: Toy) -> dict[str, str]:
    """Write the weights as two shards with an index; return each tensor's file."""
    where: dict[str, str] = {}
    names = sorted(part.state_dict())
    for number, shard in enumerate((names[:1], names[1:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: part.state_dict()[name].contiguous() for name in shard}, folder / file)
        where.update(dict.fromkeys(shard, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return where


def part_in(folder: Path) -> Part:
    """Return the part of a folder's weights, with an empty config."""
    return Part(folder, {}, tuple(weight_files(folder)))
