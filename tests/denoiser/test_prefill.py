"""Tests of the prefills in avatar.denoiser.cache: one prefill of a version for all levels of a network."""

import weakref
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from avatar.denoiser.cache import Prefills
from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.denoiser import Denoiser, DenoiserState
from avatar.denoiser.model import Network
from avatar.types import Block, Conditions, Session
from tests.denoiser.conftest import random_block, random_conditions


@pytest.fixture
def levels(network: Network, config: NetworkConfig) -> list[Denoiser]:
    """Levels of one process."""
    prefills = Prefills()
    return [Denoiser(network, config, level, prefills=prefills) for level in range(config.num_levels)]


@pytest.fixture
def computed(network: Network, monkeypatch: pytest.MonkeyPatch) -> Mock:
    """The network's prefill."""
    prefill = Mock(wraps=network.prefill)
    monkeypatch.setattr(network, "prefill", prefill)
    return prefill


@pytest.fixture
def blocks(config: NetworkConfig) -> list[Block]:
    """Two blocks under version 0, two under version 1."""
    versions = [random_conditions(config, version) for version in (0, 1)]
    return [random_block(config, index, versions[index // 2]) for index in range(4)]


def conditions_of(block: Block) -> Conditions:
    assert block.conditions is not None
    return block.conditions


def copy(conditions: Conditions) -> Conditions:
    """Return equal conditions, as another stream of the session carries them."""
    return Conditions(conditions.version, conditions.sink.clone(), conditions.text.clone())


def step(level: Denoiser, block: Block, state: DenoiserState) -> Tensor:
    latent = level.step(replace(block, conditions=copy(conditions_of(block))), state).latent
    assert latent is not None
    return latent


def alone(network: Network, config: NetworkConfig, level: int, session: Session, blocks: list[Block]) -> list[Tensor]:
    """Return the latents of a level that shares nothing and prefills nothing ahead."""
    denoiser = Denoiser(network, config, level)
    state = denoiser.open(session)
    return [step(denoiser, block, state) for block in blocks]


def test_levels_share_a_prefill_and_its_text(
    levels: list[Denoiser], session: Session, blocks: list[Block], computed: Mock, network: Network
) -> None:
    states = [level.open(session) for level in levels]
    made = [[step(level, block, state) for level, state in zip(levels, states, strict=True)] for block in blocks]
    assert computed.call_count == 2, "once a version"
    first = states[0].prefilled
    assert first is not None
    assert all(state.prefilled is first for state in states)
    assert first.sink is None, "each level has it in its cache"
    for index, latents in enumerate(zip(*made, strict=True)):
        assert all(map(torch.equal, latents, alone(network, levels[0].config, index, session, blocks)))


def test_prefill_ahead_changes_no_block(
    levels: list[Denoiser], session: Session, blocks: list[Block], computed: Mock, network: Network
) -> None:
    states = [level.open(session) for level in levels]
    for level, state in zip(levels, states, strict=True):
        level.prefill(copy(conditions_of(blocks[0])), state)
    assert computed.call_count == 1
    made: list[list[Tensor]] = [[] for _ in levels]
    for block in blocks:
        for level, state, latents in zip(levels, states, made, strict=True):
            latents.append(step(level, block, state))
        if block.index == 0:
            for level, state in zip(levels, states, strict=True):
                level.prefill(copy(conditions_of(blocks[2])), state)
            assert computed.call_count == 2
    assert computed.call_count == 2, "all was done ahead"
    for index, latents in enumerate(made):
        assert all(map(torch.equal, latents, alone(network, levels[0].config, index, session, blocks)))


def test_a_version_that_was_prefilled_by_its_block_is_not_prefilled_again(
    levels: list[Denoiser], session: Session, blocks: list[Block], computed: Mock
) -> None:
    state = levels[0].open(session)
    step(levels[0], blocks[0], state)
    levels[0].prefill(copy(conditions_of(blocks[0])), state)
    assert computed.call_count == 1


def test_no_prefill_replaces_one_that_a_level_still_needs(
    levels: list[Denoiser], session: Session, blocks: list[Block], computed: Mock, config: NetworkConfig
) -> None:
    states = [level.open(session) for level in levels[:2]]
    step(levels[0], blocks[0], states[0])
    levels[0].prefill(random_conditions(config, 1), states[0])
    step(levels[1], blocks[0], states[1])
    assert computed.call_count == 1
    levels[0].prefill(random_conditions(config, 1), states[0])
    assert computed.call_count == 2


def test_a_version_that_is_replaced_before_its_first_block_is_prefilled_again(
    levels: list[Denoiser], session: Session, blocks: list[Block], computed: Mock, network: Network
) -> None:
    state = levels[1].open(session)
    wanted = conditions_of(blocks[0])
    levels[1].prefill(replace(wanted, text=wanted.text + 1), state)
    levels[1].prefill(copy(wanted), state)
    assert computed.call_count == 2
    assert torch.equal(step(levels[1], blocks[0], state), alone(network, levels[1].config, 1, session, blocks[:1])[0])


def test_a_level_that_is_opened_again_prefills_for_itself(
    levels: list[Denoiser], session: Session, blocks: list[Block], computed: Mock, network: Network
) -> None:
    states = [level.open(session) for level in levels]
    for level, state in zip(levels, states, strict=True):
        step(level, blocks[0], state)
    states[2] = levels[2].open(session)
    again = step(levels[2], blocks[0], states[2])
    assert computed.call_count == 2
    assert torch.equal(again, alone(network, levels[0].config, 2, session, blocks[:1])[0])


def test_sessions_with_other_motion_latents_share_nothing(
    levels: list[Denoiser], session: Session, blocks: list[Block], computed: Mock
) -> None:
    other = replace(session, motion=session.motion + 1)
    states = [levels[0].open(session), levels[1].open(other)]
    for level, state in zip(levels, states, strict=False):
        level.prefill(conditions_of(blocks[0]), state)
    assert computed.call_count == 2


def test_a_prefill_is_freed_with_its_sessions_last_level(
    levels: list[Denoiser], session: Session, blocks: list[Block]
) -> None:
    states = [level.open(session) for level in levels[:2]]
    levels[0].prefill(conditions_of(blocks[0]), states[0])
    kept = weakref.ref(states[0].prefills)
    del states[0]
    assert kept() is not None
    del states[0]
    assert kept() is None


def test_conditions_that_do_not_fit_are_refused(
    levels: list[Denoiser], session: Session, config: NetworkConfig
) -> None:
    conditions = random_conditions(config, 0)
    with pytest.raises(ValueError, match="sink must have shape"):
        levels[0].prefill(replace(conditions, sink=conditions.sink[:1]), levels[0].open(session))


def test_a_text_that_is_no_matrix_is_refused(levels: list[Denoiser], session: Session, blocks: list[Block]) -> None:
    conditions = replace(conditions_of(blocks[0]), text=torch.zeros(()))
    with pytest.raises(ValueError, match=r"text must have shape \(n, \d+\), got \(\)"):
        levels[0].prefill(conditions, levels[0].open(session))
