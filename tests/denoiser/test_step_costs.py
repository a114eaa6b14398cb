"""The operators, memory traffic and copies of a step, counted on the meta device by the rules of `tests.operators`."""

from contextlib import suppress
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from avatar.denoiser.attention import block_positions
from avatar.denoiser.config import NetworkConfig, base, tiny, tiny_256
from avatar.denoiser.denoiser import Denoiser, blank_block, blank_session
from avatar.denoiser.layers import Layer
from avatar.denoiser.model import Network
from avatar.denoiser.sampler import NoiseHistory
from tests.operators import Operators, counted

# A step of the public network at 704x384 in bfloat16: level 1, a full window, the sink moves. Change a figure here only
# with the reason in the commit. At 191ee63 they were 2,514 operators (761 casts), 9 copies, 175.8 GB (casts 61.0).
META = torch.device("meta")
GEMM = ("addmm", "mm", "bmm", "convolution")
SIZE = (48, 88)
STEP = {
    "operators": 1534,
    "of them casts": 101,
    "copies to the device": 2,
    "traffic beside GEMM and attention, GB": 90.0,
    "of it casts, GB": 5.9,
    "attention, GB": 18.9,
}


def on_meta(config: NetworkConfig) -> Network:
    with META:
        return Network(config).to(torch.bfloat16).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def public_network() -> Network:
    return on_meta(base())


def operators_of_step(
    network: Network, level: int, size: tuple[int, int], is_ahead: bool = False, **inputs: Tensor
) -> Operators:
    """Return the operators of a step with a full window, whose sink is not where it was a block ago.

    The latent comes from a level before in the network's dtype, as in serving. is_ahead: inputs come before the step.
    """
    config = network.config
    denoiser = Denoiser(network, config, level)
    state = denoiser.open(replace(blank_session(config, *size), sink_distance=4))
    for index in range(config.window_blocks):
        state.cache.start_block(index, reference_frame=30)
    block = replace(blank_block(config, 100, *size), **inputs)  # type: ignore[arg-type]
    assert block.latent is not None
    assert block.conditions is not None
    with patch.object(network, "prefill", return_value=[]):
        state.prefilled = denoiser._prefill(state.session, block.conditions)
    block_positions(0, config.num_frames_per_block, *size, META)  # stays on the device after the first step
    block = replace(block, latent=block.latent.to(network.dtype))
    if is_ahead:
        drawn = denoiser.with_noise(block, state.session, NoiseHistory()) if level == 0 else block
        block = denoiser.upload(drawn)
    with counted() as operators:
        denoiser.step(block, state)
    return operators


def table(operators: Operators) -> dict[str, float]:
    """Return the figures of a step, traffic in GB of 10^9 bytes."""
    num_bytes = operators.num_bytes
    beside = num_bytes.total() - sum(num_bytes[name] for name in (*GEMM, "attention"))
    return {
        "operators": operators.counts.total(),
        "of them casts": operators.num_casts,
        "copies to the device": len(operators.copies),
        "traffic beside GEMM and attention, GB": round(beside / 1e9, 1),
        "of it casts, GB": round(num_bytes["_to_copy"] / 1e9, 1),
        "attention, GB": round(num_bytes["attention"] / 1e9, 1),
    }


def test_a_step_of_the_public_network_costs_what_the_table_says(public_network: Network) -> None:
    operators = operators_of_step(public_network, 1, SIZE)
    assert table(operators) == STEP
    assert not operators.syncs


def cast_norm(layer: Layer, x: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x.float(), x.shape[-1:], eps=layer.eps).to(x.dtype)


def test_an_added_cast_is_counted() -> None:
    network = on_meta(replace(tiny(), num_layers=2, audio_inject_layers=(0,)))
    before = operators_of_step(network, 1, (16, 16))
    with patch.object(Layer, "norm", cast_norm):
        after = operators_of_step(network, 1, (16, 16))
    # In a layer, the input of the first norm is half precision, and the second's is not.
    assert after.num_casts - before.num_casts == 2 * network.config.num_layers


@pytest.mark.parametrize("level", [0, 1])
def test_a_step_with_every_input_copies_at_most_three_times_and_never_waits(level: int) -> None:
    short = {"num_layers": 2, "audio_inject_layers": (0,), "heard_inject_layers": (1,)}
    config = replace(tiny_256(), pose="zeros", mover=None, **short)  # type: ignore[arg-type]
    pose = torch.zeros(config.cond_dim, config.num_frames_per_block, 16, 16, dtype=torch.float16)
    network = on_meta(config)
    operators = operators_of_step(network, level, (16, 16), pose=pose)
    assert 1 <= len(operators.copies) <= 3
    assert not operators.syncs
    assert not operators_of_step(network, level, (16, 16), is_ahead=True, pose=pose).copies


def test_a_mover_copies_nothing_and_never_waits() -> None:
    short = {"num_layers": 2, "audio_inject_layers": (0,), "heard_inject_layers": (1,)}
    still, moving = (replace(tiny_256(), mover=mover, **short) for mover in (None, tiny_256().mover))  # type: ignore[arg-type]
    operators_of_step(on_meta(moving), 0, (16, 16))  # the first puts constants on the device
    before, after = (operators_of_step(on_meta(config), 0, (16, 16)) for config in (still, moving))
    assert after.num_casts > before.num_casts
    assert len(after.copies) == len(before.copies)
    assert not after.syncs


@pytest.mark.parametrize("wait", ["item", "cpu", "tolist", "nonzero", "__bool__"])
def test_a_sync_is_counted(wait: str) -> None:
    x = torch.empty((), device=META)
    with counted() as operators, suppress(RuntimeError, NotImplementedError):
        getattr(x, wait)()
    assert len(operators.syncs) == 1


def test_a_constant_that_is_made_on_the_host_is_a_copy() -> None:
    with counted() as operators:
        torch.tensor([1.0, 2.0], device=META)
        torch.arange(3).to(META)
    assert operators.copies == [(2,), (3,)]
