"""The precisions in which a bfloat16 network computes, as the reference under autocast."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.denoiser import Denoiser
from avatar.denoiser.layers import Layer
from avatar.denoiser.model import Network
from avatar.types import Conditions, Session
from tests.denoiser.conftest import randn, random_block

FULL, HALF = torch.float32, torch.bfloat16


@pytest.fixture
def half(network: Network, config: NetworkConfig) -> Network:
    half = Network(config).eval().requires_grad_(False)
    half.load_state_dict(network.state_dict())
    return half.to(HALF)


@pytest.mark.parametrize(
    ("name", "enters", "leaves"),
    [
        ("patch_embedding", HALF, HALF),
        ("cond_encoder", HALF, HALF),
        ("frame_packer", HALF, HALF),
        ("text_embedding", HALF, HALF),
        ("time_embedding", FULL, FULL),
        ("time_projection", FULL, FULL),
        ("blocks.1", HALF, HALF),
        ("blocks.1.self_attn.norm_q", HALF, HALF),
        ("blocks.1.self_attn", HALF, HALF),
        ("blocks.1.norm3", HALF, HALF),
        ("blocks.1.cross_attn", HALF, HALF),
        ("blocks.1.ffn", HALF, HALF),
        ("casual_audio_encoder.encoder", FULL, FULL),
        ("audio_injector.injector_adain_layers.0", HALF, HALF),
        ("audio_injector.injector.0", HALF, HALF),
        ("head", HALF, FULL),
        ("head.head", FULL, FULL),
    ],
)
def test_each_part_computes_in_its_precision(
    name: str,
    enters: torch.dtype,
    leaves: torch.dtype,
    half: Network,
    config: NetworkConfig,
    session: Session,
    conditions: Conditions,
) -> None:
    seen: set[tuple[torch.dtype, torch.dtype]] = set()

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        seen.add((inputs[0].dtype, (output[0] if isinstance(output, tuple) else output).dtype))

    half.get_submodule(name).register_forward_hook(hook)
    denoiser = Denoiser(half, config, level=0)
    denoiser.step(random_block(config, 0, conditions), denoiser.open(session))
    assert seen == {(enters, leaves)}


def test_modulation_is_float32(half: Network) -> None:
    modulation = half.embed_time(torch.tensor([[500.0]]))
    assert {each.dtype for each in (*modulation.layers, modulation.head)} == {FULL}


def test_the_residual_is_float32_within_a_layer_and_rounded_at_its_end(config: NetworkConfig) -> None:
    layer = Layer(config).to(HALF)
    for parameter in layer.parameters():
        torch.nn.init.zeros_(parameter)
    torch.nn.init.constant_(layer.self_attn.o.bias, 1.0)
    torch.nn.init.constant_(layer.cross_attn.o.bias, 1.0)
    heads = randn(1, 1, 4, config.num_heads, config.head_dim).to(HALF)
    x = torch.full((1, 1, 4, config.dim), 256.0, dtype=HALF)  # the next bfloat16 is 258
    out = layer(x, (heads, heads, heads), (heads, heads), torch.ones(6, 1, 1, 1, config.dim))
    assert out.dtype == HALF
    assert (out == 258).all(), "256 + 1 would have been rounded to 256, twice"
