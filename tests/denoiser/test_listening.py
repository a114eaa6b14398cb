"""Tests of the network's inputs beside its own audio: what is heard from the other person, and face motion."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from avatar.checkpoints.files import save
from avatar.checkpoints.part import Part
from avatar.denoiser.audio_injection import AudioTokens
from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.denoiser import Denoiser
from avatar.denoiser.model import Network, load
from avatar.types import FACE_MOTION, Block, Conditions, Session
from tests.denoiser.conftest import HEIGHT, WIDTH, randn, random_block, random_network
from training.initialise import ZERO_INIT


@pytest.fixture(scope="module")
def listening(config: NetworkConfig) -> NetworkConfig:
    return replace(config, heard_inject_layers=(1, 2), face_motion=True)


@pytest.fixture(scope="module")
def listener(listening: NetworkConfig) -> Network:
    return random_network(listening)


def inputs(config: NetworkConfig, seed: int) -> dict[str, Any]:
    """Return random values of both inputs of a block."""
    return {
        "heard": randn(seed, config.num_encoder_layers, config.audio_dim, config.frames_per_block),
        "face_motion": 0.1 * randn(seed + 1, len(FACE_MOTION), config.frames_per_block),
    }


def latents(network: Network, session: Session, blocks: list[Block]) -> list[Tensor]:
    denoiser = Denoiser(network, network.config, level=0)
    state = denoiser.open(session)
    answers = [denoiser.step(block, state).latent for block in blocks]
    return [latent for latent in answers if latent is not None]


def given(config: NetworkConfig, conditions: Conditions, *names: str) -> list[Block]:
    """Return three blocks, the last two of which have these inputs."""
    first, *later = (random_block(config, index, conditions) for index in range(3))
    for name in names:
        later = [replace(block, **{name: inputs(config, 10 * block.index)[name]}) for block in later]
    return [first, *later]


def test_without_the_inputs_the_bytes_are_those_of_a_network_without_them(
    listener: Network, config: NetworkConfig, session: Session, conditions: Conditions
) -> None:
    plain = Network(config).eval().requires_grad_(False)
    shared = plain.state_dict()
    assert len(shared) < len(listener.state_dict())
    plain.load_state_dict({name: listener.state_dict()[name] for name in shared})
    blocks = given(config, conditions)
    expected = latents(plain, session, blocks)
    assert all(map(torch.equal, latents(listener, session, blocks), expected))


@pytest.mark.parametrize("name", ["heard", "face_motion"])
def test_each_input_changes_its_block_and_the_blocks_after(
    name: str, listener: Network, listening: NetworkConfig, session: Session, conditions: Conditions
) -> None:
    without, with_input = (latents(listener, session, given(listening, conditions, *names)) for names in ((), (name,)))
    assert torch.equal(without[0], with_input[0])
    assert not any(torch.allclose(one, other) for one, other in zip(without[1:], with_input[1:], strict=True))


def test_injectors_that_start_from_zero_change_nothing(
    listening: NetworkConfig, session: Session, conditions: Conditions
) -> None:
    network = random_network(listening)
    for name, weight in network.named_parameters():
        if name.startswith(("heard_injector", "face_motion")) and (ZERO_INIT.search(name) or name.endswith("bias")):
            weight.zero_()
    blocks = given(listening, conditions, "heard", "face_motion")
    expected = latents(network, session, given(listening, conditions))
    assert all(map(torch.equal, latents(network, session, blocks), expected))


def test_an_input_that_is_not_given_adds_nothing(listener: Network, listening: NetworkConfig) -> None:
    values, is_given = inputs(listening, 5), torch.tensor((1.0, 0.0))
    x = randn(7, 2, listening.num_frames_per_block, 24, listening.dim)
    tokens = listener.encode_heard(values["heard"].expand(2, 1, -1, -1, -1), is_given)
    added = listener.heard_injector(0, x, tokens)
    assert added[0].abs().min() > 0
    assert not added[1].any()
    moved = listener.embed_face_motion(values["face_motion"].expand(2, -1, -1), is_given)
    assert moved.shape == (2, listening.num_frames_per_block, 1, listening.dim)
    assert not moved[1].any()


def test_blocks_of_one_latent_are_encoded_with_the_columns_before_them(
    listening: NetworkConfig, session: Session, conditions: Conditions, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = replace(listening, num_frames_per_block=1, window_latents=6, audio_context_frames=8)
    network = random_network(short)
    given_tokens: list[AudioTokens | None] = []
    forward = Network.forward

    def recorded(self: Network, *arguments: Any) -> Tensor:
        given_tokens.extend((arguments[3], arguments[7]))
        return forward(self, *arguments)

    monkeypatch.setattr(Network, "forward", recorded)
    latents(network, session, given(short, conditions, "heard"))
    own = torch.cat([random_block(short, index, conditions).features for index in range(3)], dim=-1)
    heard = torch.cat([inputs(short, 10 * index)["heard"] for index in (1, 2)], dim=-1)
    tokens = network.encode_audio(own[None, None]), network.encode_heard(heard[None, None])
    for whole, parts in zip(tokens, (given_tokens[::2], given_tokens[3::2]), strict=True):
        torch.testing.assert_close(torch.cat([part.local for part in parts if part], dim=2), whole.local)
    assert given_tokens[1] is None


def test_face_motion_moves_only_its_own_latent_frame(listener: Network, listening: NetworkConfig) -> None:
    values = inputs(listening, 5)["face_motion"][None]
    changed = values.clone()
    changed[..., 4:] += 0.1
    before, after = map(listener.embed_face_motion, (values, changed))
    assert torch.equal(before[:, 0], after[:, 0])
    assert not torch.allclose(before[:, 1], after[:, 1])


@pytest.mark.parametrize("name", ["heard", "face_motion"])
def test_inputs_that_do_not_fit_are_refused_by_name(
    name: str, network: Network, listener: Network, config: NetworkConfig, session: Session, conditions: Conditions
) -> None:
    with pytest.raises(ValueError, match=f"block 1 has {name}, which this checkpoint's network does not take"):
        latents(network, session, given(config, conditions, name))
    wrong: dict[str, Any] = {name: randn(1, 2, 3)}
    short = [replace(block, **wrong) for block in given(config, conditions)]
    with pytest.raises(ValueError, match=f"{name} must have shape"):
        latents(listener, session, short)


def test_a_listening_network_is_timed_while_it_listens(
    listener: Network, listening: NetworkConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = Denoiser(listener, listening, level=0)
    step = Mock(side_effect=denoiser.step)
    monkeypatch.setattr(denoiser, "step", step)
    denoiser.warm(HEIGHT, WIDTH)
    blocks = [call.args[0] for call in step.call_args_list]
    assert blocks
    assert all(block.heard is not None and block.face_motion is not None for block in blocks)


def test_a_checkpoint_keeps_its_inputs(listener: Network, listening: NetworkConfig, tmp_path: Path) -> None:
    save(tmp_path, listening.to_dict(), listener)
    loaded = load(Part.read(tmp_path))
    assert loaded.config.inputs == ("heard", "face_motion")
    assert all(map(torch.equal, loaded.state_dict().values(), listener.state_dict().values()))


def test_layers_of_the_listeners_injector_must_ascend(config: NetworkConfig) -> None:
    with pytest.raises(ValueError, match="heard_inject_layers must be ascending"):
        replace(config, heard_inject_layers=(2, 1))
