"""Tests of stepping blocks of several sessions in one pass: avatar.denoiser.batching, and `Denoiser.step_many`."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from avatar.denoiser import batching
from avatar.denoiser.batching import batch_that_pays
from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.denoiser import Denoiser, DenoiserState
from avatar.denoiser.model import Network
from avatar.runtime.admission import Usage
from avatar.runtime.device_queue import BatchingModel, Device
from avatar.runtime.pipeline import local
from avatar.types import Block, Conditions, Session
from tests.denoiser.conftest import HEIGHT, WIDTH, randn, random_block, random_conditions, random_session

NUM_BLOCKS = 7  # the window is full at the fourth
# Blocks that each session is ahead of the first, when they are stepped together.
PHASES = (0, 1, 3)


@pytest.fixture
def batched(network: Network, config: NetworkConfig) -> Denoiser:
    denoiser = Denoiser(network, config, level=1)
    denoiser.batches[HEIGHT, WIDTH] = 4
    return denoiser


def sessions(config: NetworkConfig) -> list[tuple[Session, list[Block]]]:
    """Sessions with pictures, prompts, sound and seeds of their own; each gets new conditions in the middle."""
    made = []
    for seed, phase in enumerate(PHASES, 1):
        first, second = (random_conditions(config, 10 * seed + version) for version in (0, 1))
        second = replace(second, text=randn(seed, 4, config.text_dim))
        blocks = []
        for index in range(NUM_BLOCKS + phase):
            block = random_block(config, index, first if index < 5 else second)
            blocks.append(replace(block, features=block.features * seed, latent=latent_of(block) * seed))
        made.append((random_session(config, f"session {seed}", seed), blocks))
    return made


def alone(denoiser: Denoiser, session: Session, blocks: list[Block]) -> list[Tensor]:
    state = denoiser.open(session)
    return [latent_of(denoiser.step(block, state)) for block in blocks]


def latent_of(block: Block) -> Tensor:
    assert block.latent is not None
    return block.latent


def test_a_denoiser_batches(batched: Denoiser) -> None:
    assert isinstance(batched, BatchingModel)


def test_together_equals_alone(batched: Denoiser, config: NetworkConfig) -> None:
    """Sessions in different places of their rings, under conditions of their own."""
    given = sessions(config)
    expected = [alone(batched, *each) for each in given]
    states = [batched.open(session) for session, _ in given]
    for (_, blocks), state, phase in zip(given, states, PHASES, strict=True):
        for block in blocks[: phase + 3]:
            batched.step(block, state)
    num_together = 0
    for index in range(3, NUM_BLOCKS):
        at = [index + phase for phase in PHASES]
        blocks = [each[1][i] for each, i in zip(given, at, strict=True)]
        keys = [batched.batch(block, state) for block, state in zip(blocks, states, strict=True)]
        if None in keys:  # somebody's conditions are new
            made = [batched.step(block, state) for block, state in zip(blocks, states, strict=True)]
        else:
            num_together += 1
            assert len(set(keys)) == 1
            made = batched.step_many(blocks, states)
        for block, answers, i in zip(made, expected, at, strict=True):
            torch.testing.assert_close(latent_of(block), answers[i], rtol=1e-5, atol=1e-5)
    assert num_together >= 2


def test_only_full_windows_of_one_size_and_level_go_together(
    batched: Denoiser, network: Network, config: NetworkConfig, session: Session, conditions: Conditions
) -> None:
    other = Denoiser(network, config, level=2)
    other.batches[HEIGHT, WIDTH] = 4
    ready = []
    for denoiser in (batched, batched, other):
        state = denoiser.open(session)
        for index in range(config.window_blocks):
            block = random_block(config, index, conditions)
            assert denoiser.batch(block, state) is None, "the window is not full"
            denoiser.step(block, state)
        ready.append((denoiser, state))
    following = random_block(config, config.window_blocks, conditions)
    keys = [denoiser.batch(following, state) for denoiser, state in ready]
    assert keys[0] == keys[1] != keys[2] is not None
    state = ready[0][1]
    odd = {
        "a mistake": replace(following, index=1),
        "new conditions": replace(following, conditions=random_conditions(config, 1)),
        "a pose": replace(following, pose=randn(1, config.cond_dim, config.num_frames_per_block, HEIGHT, WIDTH)),
    }
    assert [name for name, block in odd.items() if batched.batch(block, state) is not None] == []
    batched.batches[HEIGHT, WIDTH] = 1
    assert batched.batch(following, state) is None


@pytest.fixture
def device() -> Iterator[Device]:
    with Device() as device:
        yield device


async def interleaved(
    denoiser: Denoiser, device: Device, given: list[tuple[Session, list[Block]]]
) -> tuple[list[list[Tensor]], int]:
    """All sessions at once on one device; what each was answered, and the most blocks of one pass."""
    most = 1

    async def stream(blocks: list[Block]) -> AsyncGenerator[Block, None]:
        for block in blocks:
            yield block

    async def drain(session: Session, blocks: list[Block]) -> list[Tensor]:
        nonlocal most
        usage, made = Usage(), []
        async for block in local(denoiser, session, device, usage)(stream(blocks)):
            made.append(latent_of(block))
            most = max(most, usage.shared_by)
        return made

    async with asyncio.TaskGroup() as tasks:
        draining = [tasks.create_task(drain(*each)) for each in given]
    return [each.result() for each in draining], most


async def test_interleaved_equals_alone_with_batches(batched: Denoiser, config: NetworkConfig, device: Device) -> None:
    given = sessions(config)
    expected = [alone(batched, *each) for each in given]
    answered, most = await interleaved(batched, device, given)
    assert most > 1
    for answers, alone_ in zip(answered, expected, strict=True):
        torch.testing.assert_close(answers, alone_, rtol=1e-5, atol=1e-5)


async def test_without_batches_every_session_has_its_own_bytes(
    batched: Denoiser, config: NetworkConfig, device: Device
) -> None:
    batched.batches.clear()
    given = sessions(config)
    expected = [alone(batched, *each) for each in given]
    answered, most = await interleaved(batched, device, given)
    assert most == 1
    assert all(torch.equal(a, b) for pair in zip(answered, expected, strict=True) for a, b in zip(*pair, strict=True))


@pytest.mark.parametrize(
    ("pass_s", "most", "pays"),
    [
        (lambda _: 1.0, 8, 8),  # launches are all it costs
        (lambda _: 1.0, 3, 2),
        (float, 8, 1),  # one block fills the device
        (lambda n: 0.15 + 0.85 * n, 8, 1),  # it saves less than is worth it
        (lambda n: max(1.0, n / 2), 8, 2),  # two fill it
        (lambda _: 1.0, 1, 1),
    ],
)
def test_blocks_share_a_pass_as_far_as_it_pays(
    pass_s: Callable[[int], float], most: int, pays: int, batched: Denoiser
) -> None:
    with patch.object(batching, "_pass_s", lambda _, states: pass_s(len(states))):
        assert batch_that_pays(batched, HEIGHT, WIDTH, most) == pays


def test_what_it_costs_is_measured_with_passes_of_several(batched: Denoiser) -> None:
    sizes = []
    step_many = batched.step_many

    def noting(blocks: list[Block], states: list[DenoiserState]) -> list[Block]:
        sizes.append(len(blocks))
        return step_many(blocks, states)

    with patch.object(batched, "step_many", noting):
        assert batch_that_pays(batched, HEIGHT, WIDTH, 2) in (1, 2)
    assert set(sizes) == {1, 2}
