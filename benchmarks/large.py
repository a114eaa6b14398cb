"""CPU time and peak memory of loading a large network.

    python -m benchmarks.large [--gigabytes 2]

It first writes a checkpoint of that size in bfloat16, and a LoRA adapter for it: the public network, narrower and with
fewer layers. Memory is anonymous memory; mapped files do not count.
"""

import argparse
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from avatar.checkpoints.files import save_shards
from avatar.checkpoints.layouts import open_part
from avatar.checkpoints.lora import TARGET, LoraAdapter
from avatar.denoiser.config import base, tiny
from avatar.denoiser.model import Network, load
from benchmarks.memory import anonymous_bytes, peak_bytes

ADAPTER = "adapter.safetensors"
RANK = 16


@dataclass(frozen=True)
class Loading:
    """One measurement.

    cpu_s: CPU time, which other load on the machine affects least.
    weights_bytes: of the loaded network. largest_bytes: of its largest tensor in float32.
    peak_bytes: peak growth of the process's anonymous memory.
    """

    cpu_s: float
    weights_bytes: int
    largest_bytes: int
    peak_bytes: int


def write(folder: Path, num_bytes: int) -> None:
    """Write a checkpoint whose denoiser has about `num_bytes` bytes, and an adapter for it."""
    narrow = replace(base(), dim=2048, num_heads=16, ffn_dim=8192, audio_inject_layers=(0,), num_layers=1)
    with torch.device("meta"):
        one, two = (Network(replace(narrow, num_layers=layers)).bfloat16() for layers in (1, 2))
    first, second = (sum(each.nbytes for each in network.state_dict().values()) for network in (one, two))
    config = replace(narrow, num_layers=max(1, 1 + round((num_bytes - first) / (second - first))))
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Network(config).state_dict().items()}
    numbers = ((name, torch.full(shape, 0.01, dtype=torch.bfloat16)) for name, shape in shapes.items())
    save_shards(folder / "denoiser", config.to_dict(), numbers)
    pairs: dict[str, Tensor] = {}
    for name in shapes:
        if TARGET.search(name):
            outputs, inputs = shapes[name]
            module = name.removesuffix(".weight")
            pairs[f"{module}.lora_A.weight"] = torch.full((RANK, inputs), 0.01, dtype=torch.bfloat16)
            pairs[f"{module}.lora_B.weight"] = torch.full((outputs, RANK), 0.01, dtype=torch.bfloat16)
    save_file(pairs, folder / ADAPTER)


def measure(folder: Path, dtype: torch.dtype, with_adapter: bool) -> Loading:
    """Load the network in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_load, folder, dtype, with_adapter).result()


def _load(folder: Path, dtype: torch.dtype, with_adapter: bool) -> Loading:
    torch.set_num_threads(1)
    with torch.device("meta"):
        Network(tiny())  # imports torch's lazy modules
    part = open_part(folder, "denoiser", LoraAdapter(folder / ADAPTER) if with_adapter else None)
    before = anonymous_bytes()
    start = time.process_time()
    with peak_bytes() as peak:
        network = load(part, dtype=dtype)
    cpu_s = time.process_time() - start
    weights = network.state_dict().values()
    largest = max(each.numel() for each in weights) * torch.float32.itemsize
    return Loading(cpu_s, sum(each.nbytes for each in weights), largest, peak[0] - before)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint (default 2)")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, round(flags.gigabytes * 1e9))
        print("| loaded as | adapter | CPU seconds | weights | peak above them | largest tensor, float32 |")
        print("| --- | --- | --- | --- | --- | --- |")
        for dtype in (torch.bfloat16, torch.float32):
            for with_adapter in (False, True):
                row = measure(folder, dtype, with_adapter)
                above = row.peak_bytes - row.weights_bytes
                sizes = (f"{size / 1e6:,.0f} MB" for size in (row.weights_bytes, above, row.largest_bytes))
                merged = "merged" if with_adapter else "none"
                print("|", " | ".join((str(dtype)[6:], merged, f"{row.cpu_s:.1f}", *sizes)), "|", flush=True)


if __name__ == "__main__":
    main()
