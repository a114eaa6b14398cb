"""A small random network without zero weights, and sessions, conditions and blocks for it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from avatar.denoiser.config import NetworkConfig, tiny
from avatar.denoiser.denoiser import Denoiser
from avatar.denoiser.model import Network
from avatar.types import Block, Conditions, Session

HEIGHT, WIDTH = 8, 12


every_length = pytest.mark.parametrize("config", [1, 2, 3], indirect=True)


@pytest.fixture(scope="session")
def config(request: pytest.FixtureRequest) -> NetworkConfig:
    """Four levels, five text tokens, a random sink distance, and velocity output as in the public network.

    Blocks of two latents, or of the fixture's parameter.
    """
    return replace(
        tiny(),
        in_dim=4,
        out_dim=4,
        cond_dim=4,
        dim=48,
        num_heads=2,
        num_layers=3,
        ffn_dim=80,
        freq_dim=32,
        text_dim=10,
        text_len=5,
        audio_dim=6,
        num_encoder_layers=3,
        audio_inject_layers=(0, 2),
        num_frames_per_block=getattr(request, "param", 2),
        window_latents=6,
        sink_distance=(4, 30),
        sink_update_block=3,
        pose="zeros",
        output="velocity",
    )


@pytest.fixture(scope="session")
def network(config: NetworkConfig) -> Network:
    return random_network(config)


@pytest.fixture
def denoiser(network: Network, config: NetworkConfig) -> Denoiser:
    return Denoiser(network, config, level=0)


@pytest.fixture
def session(config: NetworkConfig) -> Session:
    return random_session(config, "first", seed=1)


@pytest.fixture
def conditions(config: NetworkConfig) -> Conditions:
    return random_conditions(config, version=0)


def random_network(config: NetworkConfig) -> Network:
    """Return a network with weights of a scale at which every part contributes to the output."""
    generator = torch.Generator().manual_seed(0)
    network = Network(config).eval().requires_grad_(False)
    for name, weight in network.named_parameters():
        fan_in = weight[0].numel() if weight.ndim > 1 and "modulation" not in name else 12
        weight.copy_(torch.randn(weight.shape, generator=generator) / fan_in**0.5)
        if "norm" in name and name.endswith("weight"):
            weight.add_(1.0)
    return network


def random_session(config: NetworkConfig, name: str, seed: int) -> Session:
    return Session(name, seed, randn(seed, config.in_dim, 19, HEIGHT, WIDTH))


def random_conditions(config: NetworkConfig, version: int) -> Conditions:
    return Conditions(version, randn(100 + version, config.in_dim, 1, HEIGHT, WIDTH), randn(200, 3, config.text_dim))


def random_block(config: NetworkConfig, index: int, conditions: Conditions) -> Block:
    """Return a block with features and latent, for any level."""
    features = randn(300 + index, config.num_encoder_layers, config.audio_dim, config.frames_per_block)
    latent = randn(400 + index, config.in_dim, config.num_frames_per_block, HEIGHT, WIDTH)
    return Block(index, features, latent, conditions)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
