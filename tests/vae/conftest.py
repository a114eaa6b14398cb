"""Small real codecs with random weights, and sessions and blocks for them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from avatar.types import BLOCK_LATENTS, MOTION_LATENTS, Block, Session
from avatar.vae.codec import Codec
from avatar.vae.light import LightCodec, LightConfig
from avatar.vae.picture.rule import PictureRule
from avatar.vae.tiny_decoder import TinyDecoder, TinyDecoderCodec, TinyDecoderConfig
from avatar.vae.vae import Vae, VaeConfig
from avatar.vae.wan import WanCodec, WanConfig
from tests.published import filled

SIZE = (24, 16)
LIGHT = LightConfig(wide=16, mid=8, thin=8, latent_scale=2.0)
WAN = WanConfig(base_dim=4)


def light_codec() -> LightCodec:
    torch.manual_seed(0)
    codec = LightCodec(LIGHT).requires_grad_(False)
    codec.load_state_dict(filled(codec))
    return codec


def wan_codec() -> WanCodec:
    torch.manual_seed(0)
    codec = WanCodec(WAN)
    codec.network.load_state_dict(filled(codec.network))
    return codec


def tiny_codec() -> TinyDecoderCodec:
    """Return the tiny decoder with narrow layers, and Wan's encoder."""
    wan = wan_codec()
    torch.manual_seed(0)
    decoder = TinyDecoder((16, 8, 8, 8)).requires_grad_(False)
    decoder.load_state_dict(filled(decoder))
    return TinyDecoderCodec(wan, decoder, TinyDecoderConfig("raw"))


CODECS: dict[str, Callable[[], Codec[Any]]] = {"light": light_codec, "wan": wan_codec, "tiny": tiny_codec}


# Codecs, and latent frames of a block.
BLOCKS_OF_3, BLOCKS_OF_1 = ([(name, latents) for name in CODECS] for latents in (3, 1))
with_short_blocks = pytest.mark.parametrize("vae", BLOCKS_OF_3 + BLOCKS_OF_1, indirect=True, ids="{0[0]}-{0[1]}".format)


@pytest.fixture(params=BLOCKS_OF_3, ids="{0[0]}".format)
def vae(request: pytest.FixtureRequest) -> Vae[Any]:
    """A VAE for pictures of SIZE, with each of the codecs."""
    name, block_latents = request.param
    return Vae(CODECS[name](), config_of(name), block_latents)


def config_of(name: str) -> VaeConfig:
    """Return the configuration of a VAE with one of CODECS. The tiny decoder's is Wan's."""
    rule = PictureRule("cover", width=SIZE[0], height=SIZE[1])
    return VaeConfig("wan" if name == "tiny" else name, rule, 25, {})


def session(seed: int = 0) -> Session:
    """Return a session with motion latents drawn from its seed."""
    generator = torch.Generator().manual_seed(seed)
    return Session(f"session {seed}", seed, torch.randn(16, MOTION_LATENTS, 2, 3, generator=generator))


def blocks(count: int, seed: int = 0, block_latents: int = BLOCK_LATENTS) -> list[Block]:
    """Return the session's blocks from index 0."""
    generator = torch.Generator().manual_seed(1000 + seed)
    latents = torch.randn(count, 16, block_latents, 2, 3, generator=generator)
    return [Block(index, torch.empty(0), latent) for index, latent in enumerate(latents)]
