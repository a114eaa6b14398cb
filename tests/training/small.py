"""A small network, prepared clips for it, and what two processes of a run need to be told."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator

from avatar.denoiser.config import NetworkConfig, base, tiny
from avatar.denoiser.model import Network
from training.batches import BatchRule
from training.data import Clip, write_shard

RULE = BatchRule(batch=2, num_blocks=(3, 3))
SIZES: dict[str, Any] = {
    "in_dim": 4,
    "out_dim": 4,
    "cond_dim": 4,
    "dim": 24,
    "num_heads": 2,
    "num_layers": 2,
    "ffn_dim": 32,
    "freq_dim": 16,
    "audio_dim": 6,
    "num_encoder_layers": 2,
    "audio_inject_layers": (0,),
    "window_blocks": 2,
}


def small() -> NetworkConfig:
    """The embedded default in small."""
    return replace(tiny(), **SIZES)


def small_base() -> NetworkConfig:
    """The public network in small."""
    return replace(base(), **SIZES, text_dim=8, text_len=3)


def prepared_clip(number: int) -> Clip:
    rng = np.random.default_rng(number)
    arrays: dict[str, Any] = {
        "latents": rng.normal(size=(4, 12, 8, 8)).astype(np.float16),
        "motion": np.repeat(rng.normal(size=(4, 1, 8, 8)), 19, 1).astype(np.float16),
        "features": rng.normal(size=(2, 6, 48)).astype(np.float16),
        "lips": rng.uniform(20, 40, (48, 2)).astype(np.float32),
    }
    return Clip(f"{number:08d}", arrays, {"person": number, "lead_frames": 0})


def write_latents(folder: Path) -> Path:
    """A folder of prepared shards: four clips to train on, two held out."""
    write_shard(folder / "train" / "000000.tar", [prepared_clip(number) for number in range(4)])
    write_shard(folder / "held_out" / "000000.tar", [prepared_clip(number) for number in (90, 91)])
    return folder


def network_of(config: NetworkConfig) -> Network:
    """A network in which nothing is zero."""
    network = Network(config)
    generator = Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network


def begin(config: NetworkConfig) -> Callable[[], Network]:
    return lambda: network_of(config)
