"""Tests of the maps that move the reference's texture."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.denoiser import Denoiser
from avatar.denoiser.layers import Warps
from avatar.denoiser.model import Network
from avatar.types import Block, Conditions, Session
from tests.denoiser.conftest import HEIGHT, WIDTH, randn, random_block, random_network

NUM_WARPS = 2


@pytest.fixture(scope="module")
def warping(config: NetworkConfig) -> NetworkConfig:
    return replace(config, num_warps=NUM_WARPS, output="x0_residual", pose="reference")


@pytest.fixture
def warps(warping: NetworkConfig) -> Warps:
    """Maps that move latents down by one and to the right by one; no gate is open."""
    warps = Warps(warping)
    with torch.no_grad():
        nn.init.zeros_(warps.maps.weight)
        nn.init.zeros_(warps.gates.weight)
        nn.init.zeros_(warps.gates.bias)
        down, right = warps.maps.weight.chunk(NUM_WARPS)
        for channel in range(warping.out_dim):
            down[channel, channel, 0, 1] = 1
            right[channel, channel, 1, 0] = 1
    return warps.requires_grad_(False)


def test_a_gate_selects_a_map_at_each_latent(warps: Warps, warping: NetworkConfig) -> None:
    reference = randn(0, 1, warping.out_dim, HEIGHT, WIDTH)
    hidden = torch.zeros(1, 3, HEIGHT * WIDTH // 4, warping.dim)
    assert not warps(hidden, reference).any()
    # Gates of a token: (row column map). Its first row moves down, its last latent to the right.
    warps.gates.bias[:] = torch.tensor([[[1, 0], [1, 0]], [[0, 0], [0, 1]]], dtype=torch.float32).flatten()
    moved = warps(hidden, reference)
    assert moved.shape == (1, warping.out_dim, 3, HEIGHT, WIDTH)
    for frame in moved.unbind(2):
        torch.testing.assert_close(frame[:, :, 2::2], reference[:, :, 1:-1:2])
        torch.testing.assert_close(frame[:, :, 1::2, 1::2], reference[:, :, 1::2, ::2])
        assert not frame[:, :, 1::2, ::2].any()


def test_gates_follow_the_hidden_state(warps: Warps, warping: NetworkConfig) -> None:
    reference = randn(0, 1, warping.out_dim, HEIGHT, WIDTH)
    warps.gates.weight[::NUM_WARPS, 0] = 1
    hidden = torch.zeros(1, 2, HEIGHT * WIDTH // 4, warping.dim)
    hidden[:, 1, :, 0], hidden[:, 1, :, 1] = 1, -1  # normalised to a multiple of itself
    still, moved = warps(hidden, reference).unbind(2)
    assert not still.any()
    torch.testing.assert_close(moved[:, :, 1:], (warping.dim / 2) ** 0.5 * reference[:, :, :-1], rtol=1e-3, atol=1e-3)


def test_without_open_gates_the_output_is_that_of_a_network_without_warps(
    warping: NetworkConfig, session: Session, conditions: Conditions
) -> None:
    network = random_network(warping)
    plain = Network(replace(warping, num_warps=0)).eval().requires_grad_(False)
    plain.load_state_dict({name: weight for name, weight in network.state_dict().items() if "warps" not in name})
    block = random_block(warping, 0, conditions)

    def latent(of: Network) -> torch.Tensor:
        denoiser = Denoiser(of, of.config, level=0)
        answer: Block = denoiser.step(block, denoiser.open(session))
        assert answer.latent is not None
        return answer.latent

    assert not torch.allclose(latent(network), latent(plain))
    for gate in network.warps.gates.parameters():
        nn.init.zeros_(gate)
    assert torch.equal(latent(network), latent(plain))


@pytest.mark.parametrize("change", [{"output": "velocity"}, {"pose": "zeros"}])
def test_warps_need_a_reference_to_move(warping: NetworkConfig, change: dict[str, str]) -> None:
    with pytest.raises(
        ValueError, match="num_warps must be 0 unless output is x0_residual and pose is reference, got 2"
    ):
        replace(warping, **change)  # type: ignore[arg-type]
