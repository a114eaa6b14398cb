"""Tests of a network with a mover: its reference follows speech and face motion."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from avatar.denoiser.audio_injection import AudioTokens
from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.denoiser import Denoiser
from avatar.types import FACE_MOTION, Conditions, Session
from avatar.vae.light import LightConfig
from tests.denoiser.conftest import HEIGHT, WIDTH, randn, random_block, random_network

CODEC = LightConfig(wide=8, mid=8, thin=8, latent_scale=1.0, channels=4)


@pytest.fixture(scope="module")
def moving(config: NetworkConfig) -> NetworkConfig:
    return replace(
        config, face_motion=True, heard_inject_layers=(1,), mover=CODEC, output="x0_residual", pose="reference"
    )


def values(seed: int, num_frames: int = 8) -> Tensor:
    return 0.1 * randn(seed, 1, len(FACE_MOTION), num_frames)


def speech(config: NetworkConfig, seed: int, num_actors: int = 1, num_latents: int = 2) -> AudioTokens:
    shape = 1, num_actors, num_latents
    local = randn(seed, *shape, config.num_audio_token + 1, config.dim)
    return AudioTokens(local, randn(seed + 1, *shape, config.dim))


def reference(config: NetworkConfig) -> Tensor:
    return randn(0, 1, config.in_dim, 1, HEIGHT, WIDTH)


def test_each_latent_follows_its_own_inputs(moving: NetworkConfig) -> None:
    network = random_network(moving)
    audio, motion = speech(moving, 1), values(2)
    both = network.move(reference(moving), audio, None, motion)
    for t in range(2):
        own = AudioTokens(audio.local[:, :, t : t + 1], audio.overall[:, :, t : t + 1])
        alone = network.move(reference(moving), own, None, motion[..., 4 * t : 4 * t + 4])
        torch.testing.assert_close(both[:, :, t : t + 1], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("changed", ["audio", "heard", "values"])
def test_every_input_moves_the_reference(moving: NetworkConfig, changed: str) -> None:
    network = random_network(moving)
    for head in (network.mouth, network.brows):
        nn.init.constant_(head.bias, 0.5)
    inputs: dict[str, Any] = {"audio": speech(moving, 1), "heard": speech(moving, 3), "values": values(5)}
    others: dict[str, Any] = {"audio": speech(moving, 7), "heard": speech(moving, 9), "values": values(11)}
    moved = network.move(reference(moving), **inputs)
    other = network.move(reference(moving), **{**inputs, changed: others[changed]})
    assert not torch.allclose(moved, other)


def test_values_that_are_not_given_are_those_of_the_reference(moving: NetworkConfig) -> None:
    network, audio = random_network(moving), speech(moving, 1)
    without = network.move(reference(moving), audio)
    zeros = torch.zeros_like(values(5))
    torch.testing.assert_close(network.move(reference(moving), audio, None, zeros), without)
    dropped = replace(speech(moving, 3), mask=torch.zeros(1, 1, 1, 1, 1))
    torch.testing.assert_close(network.move(reference(moving), audio, dropped, values(5), torch.zeros(1)), without)


def test_each_actor_moves_a_share_of_the_picture(moving: NetworkConfig) -> None:
    network = random_network(moving)
    still, audio = reference(moving), speech(moving, 1, num_actors=2)
    columns = torch.arange(WIDTH // 2).expand(HEIGHT // 2, -1).flatten()
    left = (columns < WIDTH // 4).float()
    mask = torch.stack([left, 0 * left]).reshape(1, 2, 1, -1, 1).expand(1, 2, 2, -1, 1)
    moved = network.move(still, replace(audio, mask=mask))
    own = network.move(still, AudioTokens(audio.local[:, :1], audio.overall[:, :1]))
    middle = WIDTH // 2
    torch.testing.assert_close(moved[..., :middle], own[..., :middle])
    torch.testing.assert_close(moved[..., middle:], still.expand_as(moved)[..., middle:])


def test_an_untrained_network_gives_the_moved_reference(
    moving: NetworkConfig, session: Session, conditions: Conditions
) -> None:
    network = random_network(moving)
    for weight in network.head.head.parameters():
        nn.init.zeros_(weight)
    last = Denoiser(network, moving, moving.num_levels - 1)
    block = replace(random_block(moving, 0, conditions), face_motion=values(3, moving.frames_per_block)[0])
    latent = last.step(block, last.open(session)).latent
    assert latent is not None
    assert block.face_motion is not None
    audio = network.encode_audio(block.features[None, None])
    moved = network.move(conditions.sink.unsqueeze(0), audio, None, block.face_motion.unsqueeze(0))[0]
    torch.testing.assert_close(latent, moved, rtol=1e-4, atol=1e-4)


def test_later_levels_take_the_reference_that_the_first_moved(
    moving: NetworkConfig, session: Session, conditions: Conditions
) -> None:
    network = random_network(moving)
    block = replace(random_block(moving, 0, conditions), face_motion=values(3, moving.frames_per_block)[0])
    first, second, last = (Denoiser(network, moving, level) for level in (0, 1, moving.num_levels - 1))
    passed = first.step(block, first.open(session))
    assert passed.moved is not None
    assert passed.moved.shape == conditions.sink.expand(-1, moving.num_frames_per_block, -1, -1).shape
    again = second.step(replace(passed, moved=None), second.open(session))
    taken = second.step(passed, second.open(session))
    for ours, theirs in ((taken.latent, again.latent), (taken.moved, again.moved)):
        torch.testing.assert_close(ours, theirs)
    other = second.step(replace(passed, moved=0 * passed.moved), second.open(session))
    assert taken.latent is not None
    assert other.latent is not None
    assert not torch.allclose(taken.latent, other.latent)
    assert last.step(passed, last.open(session)).moved is None
    with pytest.raises(ValueError, match="moved must have shape"):
        second.step(replace(passed, moved=passed.moved[:, :, 1:]), second.open(session))


@pytest.mark.parametrize(
    "change",
    [{"output": "velocity"}, {"pose": "zeros"}, {"face_motion": False}, {"mover": replace(CODEC, channels=8)}],
)
def test_a_mover_needs_its_inputs(moving: NetworkConfig, change: dict[str, Any]) -> None:
    expected = "mover must be null, or of 4 channels beside face_motion true, output x0_residual and pose reference"
    with pytest.raises(ValueError, match=expected):
        replace(moving, **change)


def test_a_mover_is_part_of_the_configuration_file(moving: NetworkConfig, config: NetworkConfig) -> None:
    assert NetworkConfig.from_dict(moving.to_dict()) == moving
    assert "mover" not in config.to_dict()
    broken = {**moving.to_dict(), "mover": {**moving.to_dict()["mover"], "wide": 0}}
    with pytest.raises(ValueError, match=r"network\.wide must be"):
        NetworkConfig.from_dict(broken)


def test_without_a_mover_the_reference_stays(config: NetworkConfig) -> None:
    still = reference(config)
    assert random_network(config).move(still, speech(config, 1)) is still
