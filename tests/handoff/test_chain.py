"""Tests of avatar.handoff.chain within one process: who may meet, and what a stream's end takes and gives."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from avatar.errors import ConfigMismatch, InvalidField, StageLost
from avatar.handoff import chain as chains
from avatar.handoff.chain import Chain, Seat, joined
from avatar.handoff.client import RemoteChain
from avatar.rpc.channel import channel
from avatar.rpc.server import serving
from avatar.runtime.device_queue import DeviceQueue
from avatar.settings import DenoiserSettings
from avatar.store.sessions import SessionStore
from avatar.types import Block
from avatar.worker.v1.denoiser_pb2 import OpenDenoise
from services.denoiser.__main__ import build
from services.local.launch import free_ports

ALL = Seat([0, 1], 2, "digest", torch.float32, torch.device("cpu"))
FEATURES = torch.zeros(1, 2, 12)


def made(index: int) -> Block:
    return Block(index, FEATURES, torch.full((1, 3, 2, 2), float(index)))


@pytest.fixture
def address() -> str:
    return f"127.0.0.1:{free_ports(1)[0]}"


@pytest.fixture
async def chain(address: str) -> AsyncGenerator[Chain, None]:
    """A chain of one process, which serves both levels."""
    async with joined(address, ALL) as chain:
        yield chain


async def test_the_first_level_takes_nothing_and_the_last_gives_nothing(chain: Chain) -> None:
    with chain.link(7, 0) as first, chain.link(7, 1) as last:
        block = Block(0, FEATURES)
        assert await first.take(block) is block
        given = made(0)
        assert first.give(given).latent is None
        taken = await last.take(block)
        assert taken.latent is given.latent
        assert last.give(taken) is taken


async def test_what_is_handed_to_no_stream_is_dropped(chain: Chain) -> None:
    with chain.link(7, 0) as first:
        first.give(made(0))
        with chain.link(7, 1) as last:
            first.give(made(1))
            assert (await last.take(Block(1, FEATURES))).latent is not None


async def test_a_stream_is_handed_no_more_than_the_contract_lets_a_caller_send_ahead(chain: Chain) -> None:
    with chain.link(7, 0) as first, chain.link(7, 1) as last:
        for index in range(6):
            first.give(made(index))
        for index in range(4):
            await last.take(Block(index, FEATURES))
        first.give(made(6))
        with pytest.raises(ValueError, match="block 6 was handed over, expected 4"):
            await last.take(Block(4, FEATURES))


async def test_one_name_opens_a_level_once_at_a_time(chain: Chain) -> None:
    with chain.link(7, 1):
        with pytest.raises(InvalidField, match="7 is open at level 1"), chain.link(7, 1):
            pass
        with chain.link(8, 1):
            pass
    with chain.link(7, 1):
        pass


async def test_no_block_waits_for_ever(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "TAKE_S", 0.01)
    with chain.link(7, 1) as last, pytest.raises(StageLost, match="block 0 was not handed over within"):
        await last.take(Block(0, FEATURES))


async def test_a_chain_that_breaks_wakes_who_waits_and_refuses_the_next(chain: Chain) -> None:
    with chain.link(7, 0) as first, chain.link(7, 1) as last:
        waiting = asyncio.ensure_future(last.take(Block(0, FEATURES)))
        await asyncio.sleep(0)
        chain._lose("the neighbour has gone")
        with pytest.raises(StageLost, match="the neighbour has gone"):
            await waiting
        with pytest.raises(StageLost):
            await last.take(Block(1, FEATURES))
        with pytest.raises(StageLost):
            first.give(made(0))
    with pytest.raises(StageLost), chain.link(8, 0):
        pass
    await chain.until_lost()


@pytest.mark.usefixtures("chain")
async def test_a_process_that_starts_alone_does_not_join_the_chain_that_runs(address: str) -> None:
    with pytest.raises(ValueError, match=f"level 1 is taken in the chain at {address}"):
        async with joined(address, replace(ALL, levels=[1])):
            pass


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (replace(ALL, levels=[0]), replace(ALL, levels=[1], digest="other"), "serve one network"),
        (replace(ALL, levels=[0]), replace(ALL, levels=[1], dtype=torch.bfloat16), "serve one network"),
        (replace(ALL, levels=[0, 2], num_levels=3), replace(ALL, levels=[1], num_levels=3), "follow each other"),
    ],
    ids=["another network", "another precision", "a gap"],
)
async def test_processes_that_make_no_chain_do_not_start(first: Seat, second: Seat, message: str, address: str) -> None:
    async def join(seat: Seat) -> None:
        async with joined(address, seat):
            await asyncio.sleep(1)

    results = await asyncio.gather(join(first), join(second), return_exceptions=True)
    assert any(isinstance(each, ValueError) and message in str(each) for each in results)


async def test_a_level_that_does_not_come_ends_the_start(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "MEET_S", 0.2)
    with pytest.raises(ValueError, match=f"the chain did not meet at {address}"):
        async with joined(address, replace(ALL, levels=[0])):
            pass


async def test_a_worker_in_no_chain_hands_nothing_over(checkpoint: Path, store: SessionStore) -> None:
    with DeviceQueue() as queue:
        servicer = build(DenoiserSettings(checkpoint=checkpoint), store, queue)
        async with serving("127.0.0.1:0", servicer) as port, channel(f"127.0.0.1:{port}") as connection:
            with pytest.raises(ConfigMismatch, match="this worker is in no chain"):
                await RemoteChain([connection]).open(OpenDenoise(session_id="any"))
