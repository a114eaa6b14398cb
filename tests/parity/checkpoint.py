"""Goldens of checkpoints: the library opens files in the published layout, merges the adapter, and computes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from avatar.checkpoints.layouts import open_part
from avatar.checkpoints.lora import LoraAdapter
from avatar.checkpoints.part import Part
from avatar.denoiser.model import Network, load
from tests.parity.dit import Replay, config_of
from tests.parity.goldens import Golden, Report, published

WEIGHTS = "diffusion_pytorch_model.safetensors"
ADAPTER = "liveavatar.safetensors"
# Of a merge in bfloat16: the least share of equal numbers; others may be the next one.
EQUAL = 0.999


def dit_lora(golden: Golden, report: Report) -> None:
    """Base weights and adapter from their files; the merged weights, and what they compute."""
    alpha, tensors = golden.info["lora"]["alpha"], golden.tensors
    with published(config=golden.info["config"]) as checkpoint:
        save_file(under(tensors, "weights."), checkpoint / WEIGHTS)
        save_file(under(tensors, "lora."), checkpoint / ADAPTER)
        network = load_denoiser(checkpoint, golden, LoraAdapter(checkpoint / ADAPTER, alpha))
    merged = network.state_dict()
    for name, expected in under(tensors, "out.merged.").items():
        report.compare(name, merged[name], expected, **golden.info["tolerance"]["velocity"])
    Replay(golden, report, network).run()
    bfloat16_merge(tensors, alpha, report)


def dit_ckpt_tiny(golden: Golden, report: Report) -> None:
    """A whole published folder with shards and index, and an adapter with another spelling of its keys."""
    checkpoint, expected = golden.folder / golden.name, golden.sibling(golden.info["golden"])
    adapter = LoraAdapter(checkpoint / ADAPTER, golden.info["lora"]["alpha"])
    Replay(expected, report, load_denoiser(checkpoint, expected, adapter)).run()


def load_denoiser(checkpoint: Path, golden: Golden, adapter: LoraAdapter) -> Network:
    part = open_part(checkpoint, "denoiser", adapter)
    frames = config_of(golden).num_frames_per_block  # which recordings may vary, and published checkpoints may not
    return load(replace(part, config={**part.config, "num_frames_per_block": frames, "window_latents": 4 * frames}))


def bfloat16_merge(tensors: dict[str, Tensor], alpha: float, report: Report) -> None:
    with published() as folder:
        save_file(under(tensors, "bf16.base."), folder / WEIGHTS)
        save_file(under(tensors, "bf16.lora."), folder / ADAPTER)
        part = Part(folder, {}, (folder / WEIGHTS,), adapter=LoraAdapter(folder / ADAPTER, alpha))
        merged = {name: tensor.bfloat16() for name, tensor in part.tensors()}
    expected = under(tensors, "bf16.merged.")
    report.exact("bf16 merged weights", merged.keys(), expected.keys())
    # Neighbouring numbers have neighbouring bits.
    steps = torch.cat([(bits(merged[name]) - bits(expected[name])).abs().flatten() for name in expected])
    report.exact("bf16 numbers further off than the next one", int((steps > 1).sum()), 0)
    report.exact(f"bf16 equal share of at least {EQUAL}", (steps == 0).double().mean().item() >= EQUAL, True)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16).int()


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with the prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


RUNNERS: dict[str, Callable[[Golden, Report], None]] = {"dit_lora": dit_lora, "dit_ckpt_tiny": dit_ckpt_tiny}
