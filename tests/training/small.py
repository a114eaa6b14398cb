"""Small networks and clips, and stand-in landmarks."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from avatar.denoiser.config import NetworkConfig, base, tiny
from avatar.denoiser.model import Network
from avatar.vae.light import LightConfig
from training.batches import BatchConfig
from training.data import Clip, write_shard

BATCHES = BatchConfig(batch_size=2, num_blocks=(3, 3))
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
    "window_latents": 6,
}


CODEC = LightConfig(wide=8, mid=8, thin=8, latent_scale=1.0, channels=4)


def small() -> NetworkConfig:
    """Return the embedded default's configuration at toy size, with a listener and face motion."""
    return replace(tiny(), **SIZES, heard_inject_layers=(1,), face_motion=True, mover=CODEC, audio_context_frames=8)


def small_base() -> NetworkConfig:
    """Return the public network's configuration at toy size."""
    return replace(base(), **SIZES, text_dim=8, text_len=3)


def prepared_clip(number: int) -> Clip:
    rng = np.random.default_rng(number)
    arrays: dict[str, Any] = {
        "latents": rng.normal(size=(4, 12, 8, 8)).astype(np.float16),
        "motion": np.repeat(rng.normal(size=(4, 1, 8, 8)), 19, 1).astype(np.float16),
        "features": rng.normal(size=(2, 6, 48)).astype(np.float16),
        "heard": rng.normal(size=(2, 6, 48)).astype(np.float16),
        "lips": rng.uniform(20, 40, (48, 2)).astype(np.float32),
        "blink": rng.uniform(0, 1, 48).astype(np.float32),
        "pose": (0.1 + rng.normal(0, 0.1, (48, 3))).astype(np.float32),
        "reference_pose": rng.normal(0, 0.1, 3).astype(np.float32),
        "gaze": rng.normal(0, 0.1, (48, 2)).astype(np.float32),
    }
    return Clip(f"{number:08d}", arrays, {"person": number, "lead_frames": 0})


def write_latents(folder: Path) -> Path:
    """Write a folder of prepared shards: four training clips and two held-out clips."""
    write_shard(folder / "train" / "000000.tar", [prepared_clip(number) for number in range(4)])
    write_shard(folder / "held_out" / "000000.tar", [prepared_clip(number) for number in (90, 91)])
    return folder


def network_of(config: NetworkConfig) -> Network:
    """Return a network with no zero weights."""
    network = Network(config)
    generator = Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            # Pictures of a codec with large weights are black or white, wherever they are moved.
            scale = 0.05 if name.startswith("mover") else 0.3
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return network


def maker(config: NetworkConfig) -> Callable[[], Network]:
    return lambda: network_of(config)


def noisy_clip(number: int, lead_frames: int) -> Clip:
    """Return a clip of 24 random frames at 64x64, with audio before and after them."""
    rng = np.random.default_rng(number)
    arrays: dict[str, Any] = {
        "frames": rng.integers(0, 256, (24, 64, 64, 3), np.uint8),
        "reference": rng.integers(0, 256, (64, 64, 3), np.uint8),
        "sound": rng.integers(-9999, 9999, (lead_frames + 24 + 16) * 640, np.int16),
        "jaw": np.arange(24, dtype=np.float32),
    }
    return Clip(str(number), arrays, {"lead_frames": lead_frames})


class BrightMouths:
    """Landmarks that take brightness for the opening of the mouth, and find no face in black frames."""

    def points(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        brightness = frames.mean((1, 2, 3))
        return np.where(brightness[:, None, None] > 0, face(brightness), np.float32(np.nan))


def face(openings: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return mesh points with only lips and eyes set; the eyes are 20 apart."""
    points = np.zeros((len(openings), 468, 2), np.float32)
    points[:, 263, 0] = 20
    points[:, 17, 1] = openings
    return points


def tensors(state: Any) -> list[Tensor]:
    """Return all tensors of a nested state, in the order of their keys."""
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, dict):
        state = [state[key] for key in sorted(state, key=str)]
    return [tensor for value in state for tensor in tensors(value)] if isinstance(state, list | tuple) else []
