"""Chains of real denoisers, in one process and in several, and their sessions and blocks."""

import asyncio
import sys
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc.aio
import torch

from avatar.checkpoints.layouts import open_part
from avatar.denoiser.denoiser import Denoiser
from avatar.denoiser.model import load
from avatar.handoff.chain import join_chain
from avatar.handoff.client import RemoteChain
from avatar.rpc.channel import channel
from avatar.rpc.codec import block_to_wire, conditions_to_pb, tensor_to_pb
from avatar.rpc.server import serving
from avatar.runtime.device_queue import DeviceQueue
from avatar.settings import DenoiserSettings
from avatar.store.redis import RedisHashes
from avatar.store.sessions import SessionStore
from avatar.types import Block, Conditions, Session
from avatar.worker.v1 import denoiser_pb2_grpc
from avatar.worker.v1 import types_pb2 as pb
from avatar.worker.v1.denoiser_pb2 import DenoiserServiceGetInfoRequest, DenoiserServiceGetInfoResponse, OpenDenoise
from services.denoiser.__main__ import build
from services.local.processes import Suite, free_ports, until_healthy

NUM_LEVELS = 3
SINK_UPDATE_BLOCK = 2
NUM_BLOCKS = 6  # past the sink's update and the window
LATENTS = (16, 3, 8, 8)


@dataclass(frozen=True)
class Chain:
    """A running chain that serves the tests' checkpoint.

    targets, channels: of each level's worker. suite: its processes; None if this process serves all levels.
    """

    targets: list[str]
    channels: list[grpc.aio.Channel]
    store: SessionStore
    suite: Suite | None = None

    async def stage(self, session: Session) -> RemoteChain:
        """Open a session's streams."""
        stage = RemoteChain(self.channels)
        await stage.open(OpenDenoise(session_id=session.id, session=message_of(session)))
        return stage

    async def infos(self) -> list[DenoiserServiceGetInfoResponse]:
        """Return the description of each level's worker."""
        stubs = [denoiser_pb2_grpc.DenoiserServiceStub(each) for each in self.channels]
        return [await stub.GetInfo(DenoiserServiceGetInfoRequest(), timeout=5) for stub in stubs]


def random_session(name: str, seed: int) -> Session:
    return Session(name, seed, torch.randn(LATENTS, generator=torch.Generator().manual_seed(seed)))


def message_of(session: Session) -> pb.Session:
    return pb.Session(id=session.id, seed=session.seed, motion=tensor_to_pb(session.motion))


def first_conditions(session: Session) -> Conditions:
    return Conditions(0, session.motion[:, :1], torch.zeros(0, 8))


def blocks_of(session: Session, checkpoint: Path) -> list[Block]:
    """Return the session's blocks, of noise as features and without conditions."""
    config = open_part(checkpoint, "denoiser").config
    generator = torch.Generator().manual_seed(session.seed)
    shape = config["num_encoder_layers"], config["audio_dim"], 12
    return [Block(index, torch.randn(shape, generator=generator)) for index in range(NUM_BLOCKS)]


def denoised_locally(checkpoint: Path, session: Session) -> list[bytes]:
    """Return the bytes of the blocks' latents, from levels called one after another in this process."""
    network = load(open_part(checkpoint, "denoiser"))
    levels = [Denoiser(network, network.config, level) for level in range(NUM_LEVELS)]
    states = [level.open(session) for level in levels]
    conditions, made = [first_conditions(session)], []
    for block in blocks_of(session, checkpoint):
        block = replace(block, conditions=conditions[block.index >= SINK_UPDATE_BLOCK])
        for level, state in zip(levels, states, strict=True):
            block = level.step(block, state)
        assert block.latent is not None
        if block.index == 0:
            conditions.append(conditions[0].with_sink(block.latent))
        made.append(tensor_to_pb(block.latent).data)
    return made


async def denoised_by(stage: RemoteChain, checkpoint: Path, session: Session, pause_s: float = 0.0) -> list[bytes]:
    """Return the bytes of the blocks' latents, from a chain."""
    is_updated = asyncio.Event()
    made: list[bytes] = []
    conditions = conditions_to_pb(first_conditions(session))

    async def blocks() -> AsyncGenerator[Any, None]:
        for block in blocks_of(session, checkpoint):
            if block.index in (0, 1):
                yield conditions  # ahead of their blocks, or of a version that is in force already
            await asyncio.sleep(pause_s)
            if block.index == SINK_UPDATE_BLOCK:
                await is_updated.wait()
            message = block_to_wire(block).to_pb()
            message.conditions = int(block.index >= SINK_UPDATE_BLOCK)
            if block.index in (0, SINK_UPDATE_BLOCK):
                message.carried.CopyFrom(conditions)
            yield message

    async for answer in stage(blocks()):
        assert answer.index == len(made)
        if answer.head.HasField("carried"):
            conditions = answer.head.carried
            is_updated.set()
        made.append(answer.to_pb().latent.data)
    return made


@asynccontextmanager
async def in_this_process(checkpoint: Path, redis_url: str, listen: str = "127.0.0.1:0") -> AsyncGenerator[Chain, None]:
    """Run a chain of this process alone, which hands latents over in memory. listen: HOST:PORT of its worker."""
    address = f"127.0.0.1:{free_ports(1)[0]}"
    async with AsyncExitStack() as stack:
        queue = stack.enter_context(DeviceQueue())
        store = SessionStore(RedisHashes(redis_url))
        stack.push_async_callback(store.aclose)
        servicer = build(DenoiserSettings(checkpoint=checkpoint, chain=address), store, queue)
        servicer.chain = await stack.enter_async_context(join_chain(address, servicer.chain_member("gloo")))
        port = await stack.enter_async_context(serving(listen, servicer))
        target = f"127.0.0.1:{port}"
        one = await stack.enter_async_context(channel(target))
        yield Chain([target] * NUM_LEVELS, [one] * NUM_LEVELS, store)


@asynccontextmanager
async def in_processes(
    checkpoint: Path, redis_url: str, folder: Path, shares: tuple[str, ...]
) -> AsyncGenerator[Chain, None]:
    """Run a chain of one process for each share of the levels, such as `0,1`."""
    meeting, *ports = free_ports(1 + len(shares))
    targets = {levels: f"127.0.0.1:{port}" for levels, port in zip(shares, ports, strict=True)}
    async with AsyncExitStack() as stack:
        suite = await stack.enter_async_context(Suite(folder, redis_url, targets))
        for levels, target in targets.items():
            settings = {
                "AVATAR_CHECKPOINT": str(checkpoint),
                "AVATAR_REDIS_URL": redis_url,
                "AVATAR_LISTEN": target,
                "AVATAR_LEVELS": levels,
                "AVATAR_CHAIN": f"127.0.0.1:{meeting}",
            }
            await suite.start(levels, sys.executable, "-m", "services.denoiser", **settings)
        await until_healthy(suite)
        opened = {levels: await stack.enter_async_context(channel(target)) for levels, target in targets.items()}
        store = SessionStore(RedisHashes(redis_url))
        stack.push_async_callback(store.aclose)
        served = [levels for levels in shares for _ in levels.split(",")]
        yield Chain([targets[each] for each in served], [opened[each] for each in served], store, suite)
