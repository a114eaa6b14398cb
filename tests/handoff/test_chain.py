"""Tests of avatar.handoff.chain within one process: which members may meet, and how latents are handed over."""

import asyncio
import os
import threading
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]  # documented, not exported

from avatar.errors import ConfigMismatch, InvalidField, StageLost
from avatar.handoff import chain as chains
from avatar.handoff.chain import Chain, ChainMember, ChainStream, join_chain
from avatar.handoff.client import RemoteChain
from avatar.rpc.channel import channel
from avatar.rpc.server import serving
from avatar.runtime.device_queue import DeviceQueue
from avatar.settings import DenoiserSettings
from avatar.store.sessions import SessionStore
from avatar.types import Block
from avatar.worker.v1.denoiser_pb2 import OpenDenoise
from services.denoiser import __main__ as denoiser_main
from services.denoiser.__main__ import build
from services.local.processes import free_ports
from tests.busy import WAIT_S
from tests.handoff.chains import message_of, random_session

ALL = ChainMember([0, 1], 2, "digest", torch.float32, torch.device("cpu"))
FEATURES = torch.zeros(1, 2, 12)


def denoised(index: int) -> Block:
    return Block(index, FEATURES, torch.full((1, 3, 2, 2), float(index)))


@pytest.fixture
def address() -> str:
    return f"127.0.0.1:{free_ports(1)[0]}"


@pytest.fixture
async def chain(address: str) -> AsyncGenerator[Chain, None]:
    """A chain of one process, which serves both levels."""
    async with join_chain(address, ALL) as chain:
        yield chain


async def test_the_first_level_receives_nothing_and_the_last_hands_over_nothing(chain: Chain) -> None:
    with chain.open_stream(7, 0) as first, chain.open_stream(7, 1) as last:
        block = Block(0, FEATURES)
        assert await first.receive(block) is block
        given = denoised(0)
        assert first.hand_over(given).latent is None
        received = await last.receive(block)
        assert received.latent is given.latent
        assert last.hand_over(received) is received


async def test_a_latent_for_a_stream_that_is_not_open_is_dropped(chain: Chain) -> None:
    with chain.open_stream(7, 0) as first:
        first.hand_over(denoised(0))
        with chain.open_stream(7, 1) as last:
            first.hand_over(denoised(1))
            assert (await last.receive(Block(1, FEATURES))).latent is not None


async def test_a_stream_keeps_no_more_latents_than_a_caller_may_send_ahead(chain: Chain) -> None:
    with chain.open_stream(7, 0) as first, chain.open_stream(7, 1) as last:
        for index in range(6):
            first.hand_over(denoised(index))
        for index in range(4):
            await last.receive(Block(index, FEATURES))
        first.hand_over(denoised(6))
        with pytest.raises(ValueError, match="block 6 was handed over, expected 4"):
            await last.receive(Block(4, FEATURES))


async def test_a_handoff_is_open_once_at_a_level(chain: Chain) -> None:
    with chain.open_stream(7, 1):
        with pytest.raises(InvalidField, match="7 is open at level 1"), chain.open_stream(7, 1):
            pass
        with chain.open_stream(8, 1):
            pass
    with chain.open_stream(7, 1):
        pass


async def test_a_latent_that_does_not_arrive_is_a_lost_stage(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "RECEIVE_S", 0.01)
    with chain.open_stream(7, 1) as last, pytest.raises(StageLost, match="block 0 was not handed over within"):
        await last.receive(Block(0, FEATURES))


async def test_a_broken_chain_fails_waiting_streams_and_new_ones(chain: Chain) -> None:
    with chain.open_stream(7, 0) as first, chain.open_stream(7, 1) as last:
        waiting = asyncio.ensure_future(last.receive(Block(0, FEATURES)))
        await asyncio.sleep(0)
        chain._break("the neighbour has gone")
        with pytest.raises(StageLost, match="the neighbour has gone"):
            await waiting
        with pytest.raises(StageLost):
            await last.receive(Block(1, FEATURES))
        with pytest.raises(StageLost):
            first.hand_over(denoised(0))
    with pytest.raises(StageLost), chain.open_stream(8, 0):
        pass
    await chain.until_broken()


@pytest.mark.usefixtures("chain")
async def test_a_process_that_restarts_alone_cannot_join_the_running_chain(address: str) -> None:
    with pytest.raises(ValueError, match=f"level 1 is taken in the chain at {address}"):
        async with join_chain(address, replace(ALL, levels=[1])):
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
async def test_processes_that_make_no_chain_do_not_start(
    first: ChainMember, second: ChainMember, message: str, address: str
) -> None:
    async def join(member: ChainMember) -> None:
        async with join_chain(address, member):
            await asyncio.sleep(1)

    results = await asyncio.gather(join(first), join(second), return_exceptions=True)
    assert any(isinstance(each, ValueError) and message in str(each) for each in results)


async def test_a_missing_level_ends_the_start(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "RENDEZVOUS_S", 0.2)
    with pytest.raises(ValueError, match=f"the chain did not meet at {address}"):
        async with join_chain(address, replace(ALL, levels=[0])):
            pass


async def test_a_worker_in_no_chain_refuses_to_hand_over(checkpoint: Path, store: SessionStore) -> None:
    with DeviceQueue() as queue:
        servicer = build(DenoiserSettings(checkpoint=checkpoint), store, queue)
        async with serving("127.0.0.1:0", servicer) as port, channel(f"127.0.0.1:{port}") as connection:
            with pytest.raises(ConfigMismatch, match="this worker is in no chain"):
                await RemoteChain([connection]).open(OpenDenoise(session=message_of(random_session("a", 1))))


def test_latents_travel_through_pinned_memory_of_the_host_unless_nccl_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[tuple[torch.device, bool]] = []
    monkeypatch.setattr(torch, "empty", lambda *_, device, pin_memory, **__: made.append((device, pin_memory)))
    on_gpu = replace(ALL, device=torch.device("cuda:1"))
    for member in (ALL, on_gpu, replace(on_gpu, backend="nccl")):
        member.empty_latent([1])
    assert made == [(torch.device("cpu"), False), (torch.device("cpu"), True), (torch.device("cuda:1"), False)]


async def test_latents_for_a_level_here_stay_on_the_device() -> None:
    chain = Chain("c", replace(ALL, num_levels=3), 0, 1)
    streams = [ChainStream(chain, 7, level) for level in range(3)]
    assert [each.sends_from_host for each in streams] == [False, True, True]


@pytest.mark.parametrize(("rank", "expected"), [(0, ["to 1"]), (1, ["from 0", "to 2"]), (2, ["from 1"])])
def test_neighbours_exchange_a_header_and_a_latent_before_the_first_block(
    rank: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(dist, "init_process_group", Mock())
    monkeypatch.setattr(dist, "isend", lambda _, to: Mock(wait=lambda _: seen.append(f"to {to}")))
    monkeypatch.setattr(dist, "irecv", lambda _, source: Mock(wait=lambda _: seen.append(f"from {source}")))
    chains._make_group(HashStore(), rank, 3, ALL)
    assert seen == expected * 2


async def test_the_group_of_a_broken_chain_is_not_waited_for(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    destroyed = Mock()
    monkeypatch.setattr(dist, "destroy_process_group", destroyed)
    monkeypatch.setattr(chains, "_meet", lambda *_: (HashStore(), "c", [0, 1]))
    monkeypatch.setattr(chains, "_make_group", lambda *_: None)
    monkeypatch.setattr(chains, "HEARTBEAT_S", 0.0)
    monkeypatch.setattr(dist, "isend", Mock(side_effect=RuntimeError("the neighbour has gone")))
    async with join_chain(address, replace(ALL, levels=[0])) as chain:
        await chain.until_broken()
    assert not destroyed.called


async def test_nccl_needs_gpus(address: str) -> None:
    with pytest.raises(ValueError, match="a chain over nccl needs levels on a GPU, these are on cpu"):
        async with join_chain(address, replace(ALL, backend="nccl")):
            pass


async def test_a_process_that_lost_its_chain_ends_even_if_something_keeps_it(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()
    monkeypatch.setattr(denoiser_main, "EXIT_S", 0.0)
    monkeypatch.setattr(os, "_exit", lambda _: ended.set())
    chain._break("the neighbour has gone")
    with pytest.raises(StageLost):
        await denoiser_main.until_stopped_or_lost(chain)
    assert ended.wait(WAIT_S)
