"""Tests of the maps by which face motion moves the reference."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from avatar.denoiser.audio_injection import AudioTokens
from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.denoiser import Denoiser
from avatar.denoiser.layers import MAP_SIDE, MOVER_DIM, Mover
from avatar.types import FACE_MOTION, Conditions, Session
from tests.denoiser.conftest import HEIGHT, WIDTH, randn, random_block, random_network

NUM_WARPS = 2


@pytest.fixture(scope="module")
def moving(config: NetworkConfig) -> NetworkConfig:
    return replace(
        config, face_motion=True, heard_inject_layers=(1,), num_warps=NUM_WARPS, output="x0_residual", pose="reference"
    )


def values(seed: int, num_frames: int = 8) -> Tensor:
    return 0.1 * randn(seed, 1, len(FACE_MOTION), num_frames)


def speech(config: NetworkConfig, seed: int, num_actors: int = 1, num_latents: int = 2) -> AudioTokens:
    shape = 1, num_actors, num_latents
    local = randn(seed, *shape, config.num_audio_token + 1, config.dim)
    return AudioTokens(local, randn(seed + 1, *shape, config.dim))


def test_open_gates_move_the_reference(moving: NetworkConfig) -> None:
    """The first map moves latents down by two, the second to the right by one."""
    mover = Mover(moving).requires_grad_(False)
    for weight in mover.last.parameters():
        nn.init.zeros_(weight)
    channels = moving.out_dim
    down, right = mover.maps.view(NUM_WARPS, channels, channels, MAP_SIDE, MAP_SIDE)
    for channel in range(channels):
        down[channel, channel, 0, 2] = 1
        right[channel, channel, 2, 1] = 1
    reference = randn(0, 1, moving.out_dim, HEIGHT, WIDTH)
    embedded = randn(1, 1, 2, MOVER_DIM)
    assert not mover(mover.read(reference), embedded).any()
    assert mover.last.bias is not None
    mover.last.bias[:NUM_WARPS] = torch.tensor((0.5, 2))
    change = mover(mover.read(reference), embedded)
    assert change.shape == (1, moving.out_dim, 2, HEIGHT, WIDTH)
    for frame in change.unbind(2):
        expected = 0.5 * reference[:, :, :-2, 1:] + 2 * reference[:, :, 2:, :-1]
        torch.testing.assert_close(frame[:, :, 2:, 1:], expected)


def test_each_latent_follows_its_own_inputs(moving: NetworkConfig) -> None:
    network = random_network(moving)
    reference = randn(0, 1, moving.out_dim, 1, HEIGHT, WIDTH)
    audio, motion = speech(moving, 1), values(2)
    both = network.move(reference, audio, None, motion)
    for t in range(2):
        own = AudioTokens(audio.local[:, :, t : t + 1], audio.overall[:, :, t : t + 1])
        alone = network.move(reference, own, None, motion[..., 4 * t : 4 * t + 4])
        torch.testing.assert_close(both[:, :, t : t + 1], alone)


@pytest.mark.parametrize("changed", ["audio", "heard", "values"])
def test_every_input_moves_the_reference(moving: NetworkConfig, changed: str) -> None:
    network = random_network(moving)
    reference = randn(0, 1, moving.out_dim, 1, HEIGHT, WIDTH)
    inputs = {"audio": speech(moving, 1), "heard": speech(moving, 3), "values": values(5)}
    others = {"audio": speech(moving, 7), "heard": speech(moving, 9), "values": values(11)}
    moved = network.move(reference, **inputs)  # type: ignore[arg-type]
    other = network.move(reference, **{**inputs, changed: others[changed]})  # type: ignore[arg-type]
    assert not torch.allclose(moved, other)


def test_dropped_inputs_are_ignored(moving: NetworkConfig) -> None:
    network = random_network(moving)
    reference = randn(0, 1, moving.out_dim, 1, HEIGHT, WIDTH)
    audio, heard = speech(moving, 1), speech(moving, 3)
    dropped = replace(heard, mask=torch.zeros(1, 1, 1, 1, 1))
    without = network.move(reference, audio)
    torch.testing.assert_close(network.move(reference, audio, dropped, values(5), torch.zeros(1)), without)
    assert not torch.allclose(network.move(reference, audio, heard), without)
    # Values of 0, the pose of the reference, are not the same as none.
    assert not torch.allclose(network.move(reference, audio, None, torch.zeros_like(values(5))), without)


def test_each_actor_moves_a_share_of_the_picture(moving: NetworkConfig) -> None:
    network = random_network(moving)
    reference = randn(0, 1, moving.out_dim, 1, HEIGHT, WIDTH)
    audio = speech(moving, 1, num_actors=2)
    columns = torch.arange(WIDTH // 2).expand(HEIGHT // 2, -1).flatten()
    left = (columns < WIDTH // 4).float()
    mask = torch.stack([left, 0 * left]).reshape(1, 2, 1, -1, 1).expand(1, 2, 2, -1, 1)
    moved = network.move(reference, replace(audio, mask=mask))
    own = network.move(reference, AudioTokens(audio.local[:, :1], audio.overall[:, :1]))
    middle = WIDTH // 2
    torch.testing.assert_close(moved[..., :middle], own[..., :middle])
    assert torch.equal(moved[..., middle:], reference.expand_as(moved)[..., middle:])


def test_an_untrained_network_gives_the_moved_reference(
    moving: NetworkConfig, session: Session, conditions: Conditions
) -> None:
    network = random_network(moving)
    for weight in network.head.head.parameters():
        nn.init.zeros_(weight)
    last = Denoiser(network, moving, moving.num_levels - 1)
    block = replace(random_block(moving, 0, conditions), face_motion=values(3, moving.frames_per_block)[0])
    latent = last.step(block, last.open(session)).latent
    reference = conditions.sink.unsqueeze(0)
    assert latent is not None
    assert block.face_motion is not None
    audio = network.encode_audio(block.features[None, None])
    moved = network.move(reference, audio, None, block.face_motion.unsqueeze(0))[0]
    torch.testing.assert_close(latent, moved, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [{"output": "velocity"}, {"pose": "zeros"}, {"face_motion": False}])
def test_a_mover_needs_a_reference_and_its_motion(moving: NetworkConfig, change: dict[str, str]) -> None:
    expected = "num_warps must be 0 unless face_motion is true, output is x0_residual and pose is reference, got 2"
    with pytest.raises(ValueError, match=expected):
        replace(moving, **change)  # type: ignore[arg-type]


def test_without_a_mover_the_reference_stays(config: NetworkConfig) -> None:
    reference = randn(0, 1, config.in_dim, 1, HEIGHT, WIDTH)
    assert random_network(config).move(reference, speech(config, 1)) is reference
