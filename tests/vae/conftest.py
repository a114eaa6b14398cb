"""Small real codecs with random weights, and sessions and blocks for them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from avatar.types import BLOCK_LATENTS, MOTION_LATENTS, Block, Session
from avatar.vae.codec import Codec
from avatar.vae.light import LightCodec, LightConfig, initialise
from avatar.vae.picture import PictureRule
from avatar.vae.vae import Vae, VaeConfig
from avatar.vae.wan import WanCodec, WanConfig

SIZE = (24, 16)
LIGHT = LightConfig(wide=16, mid=8, thin=8, latent_scale=2.0)
WAN = WanConfig(base_dim=4)


def light_codec() -> LightCodec:
    """Return a codec as if trained: its correction, zero in an untrained codec, is not zero."""
    codec = initialise(LIGHT, seed=0).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for layer in (codec.encoder.leave, codec.decoder.leave):
        layer.weight.copy_(0.1 * torch.randn(layer.weight.shape, generator=generator))
    codec.mean.copy_(torch.randn(codec.mean.shape, generator=generator))
    return codec


def wan_codec(config: WanConfig = WAN) -> WanCodec:
    codec = WanCodec(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in codec.network.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if name.endswith("gamma"):
            parameter.copy_(1 + 0.1 * drawn)
        elif name.endswith("bias"):
            parameter.copy_(0.1 * drawn)
        else:
            parameter.copy_(drawn / parameter[0].numel() ** 0.5)
    return codec


CODECS: dict[str, Callable[[], Codec[Any]]] = {"light": light_codec, "wan": wan_codec}


@pytest.fixture(params=CODECS)
def vae(request: pytest.FixtureRequest) -> Vae[Any]:
    """A VAE for pictures of SIZE, with each of the codecs."""
    rule = PictureRule("cover", width=SIZE[0], height=SIZE[1])
    return Vae(CODECS[request.param](), VaeConfig(request.param, rule, 25, {}))


def session(seed: int = 0) -> Session:
    """Return a session with motion latents drawn from its seed."""
    generator = torch.Generator().manual_seed(seed)
    return Session(f"session {seed}", seed, torch.randn(16, MOTION_LATENTS, 2, 3, generator=generator))


def blocks(count: int, seed: int = 0) -> list[Block]:
    """Return the session's blocks from index 0."""
    generator = torch.Generator().manual_seed(1000 + seed)
    latents = torch.randn(count, 16, BLOCK_LATENTS, 2, 3, generator=generator)
    return [Block(index, torch.empty(0), latent) for index, latent in enumerate(latents)]
