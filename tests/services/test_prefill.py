"""Prefill ahead of blocks and once a process, from the gateway's pipeline to real services in simulated time."""

import math
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from avatar.aio import background
from avatar.failover.connector import level_connector
from avatar.failover.pool import WorkerPool
from avatar.failover.stage import FailoverStage, FailoverTimeouts
from avatar.rpc.codec import conditions_to_pb, tensor_from_pb, tensor_to_pb
from avatar.rpc.server import serving
from avatar.rpc.wire import RelayedBlock, serialize_session
from avatar.runtime.device_queue import DeviceQueue
from avatar.settings import GatewaySettings
from avatar.store.sessions import SessionStore
from avatar.types import Conditions
from avatar.worker.v1 import denoiser_pb2, denoiser_pb2_grpc, types_pb2
from services.gateway.options import StreamOptions
from services.gateway.stages import SessionStages
from services.gateway.stream.live_stream import LiveStream
from services.local.processes import Suite, free_ports, until_healthy
from tests.product import CLOSE, pieces
from tests.services import event_time
from tests.services.event_time import CONFIG, DIGEST, PREFILL_S, SIDE, STEP_S

NUM_LEVELS = 4
NUM_BLOCKS = 32
BLOCK_BYTES = 2 * 16000 * 4 // 25
# The prompt is changed when this block has been decoded, or when each from this one on has.
PROMPT_BLOCK = 10
EPSILON_S = 1e-3
SESSION = types_pb2.Session(id="a", frame_rate_hz=25, block_frames=4)
OFFLINE = StreamOptions(encoding="pcm16", rate_hz=16000, num_channels=1, video="rgb24")
TIMEOUTS = FailoverTimeouts(stall_s=120.0, rebuild_s=30.0)


class Encoder:
    """An audio stage that answers each block of audio with features that hold the time when it arrived."""

    stage, lost_at_s, is_answer_due, on_rebuilt = "audio", -math.inf, False, None
    closed = types_pb2.Closed()

    def __init__(self, block_s: float) -> None:
        self._block_s = block_s

    async def __call__(self, items: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
        num_bytes = index = 0
        async with aclosing(items):
            async for piece in items:
                num_bytes += len(piece.data)
                while num_bytes >= (index + 1) * BLOCK_BYTES:
                    features = torch.full((1, 1, 4), index * self._block_s)
                    message = types_pb2.Block(index=index, features=tensor_to_pb(features))
                    yield RelayedBlock.from_bytes(message.SerializeToString())
                    index += 1


class Decoder:
    """A decoder that records what the latents hold, and changes the prompt in mid-stream."""

    stage, lost_at_s, on_rebuilt = "vae", -math.inf, None
    closed = types_pb2.Closed()

    def __init__(self, changes_often: bool) -> None:
        self.changes_often = changes_often
        self.ended_s: list[float] = []
        self.num_prefills = 0
        self.stream: LiveStream | None = None
        self.prompt_block = 0

    async def __call__(self, items: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
        async with aclosing(items):
            async for block in items:
                latent = tensor_from_pb(block.to_pb().latent)
                self.ended_s.append(latent[0].max().item())
                self.num_prefills = int(latent[1].max())
                if block.index == PROMPT_BLOCK or (self.changes_often and block.index > PROMPT_BLOCK):
                    assert self.stream
                    self.prompt_block = await self.stream.versions.change(self._write)
                yield types_pb2.Frame(block=block.index, is_last=True)

    async def _write(self, newest: int, version: int) -> types_pb2.Conditions:
        assert self.stream
        assert self.changes_often or version == newest + 1
        sink = tensor_from_pb(self.stream.versions.known[-1].sink)
        return conditions_to_pb(Conditions(version, sink, torch.full((1, CONFIG.text_dim), self.ended_s[-1])))


async def decoded(targets: Sequence[str], block_s: float = 0.0, *, changes_often: bool = False) -> Decoder:
    """Return the decoder of a session whose levels are at these addresses; its audio comes a block every block_s.

    changes_often: the prompt is changed with every block, and not once.
    """

    async def get_info(connection: Any) -> Any:
        stub = denoiser_pb2_grpc.DenoiserServiceStub(connection)
        return await stub.GetInfo(denoiser_pb2.DenoiserServiceGetInfoRequest(), timeout=20)

    pool: WorkerPool[Any] = WorkerPool("denoiser", sorted({*targets}), get_info)
    motion = tensor_to_pb(torch.zeros(2, 1, SIDE, SIDE)).SerializeToString()
    async with pool.running():
        await pool.refresh()
        levels = []
        for number in range(NUM_LEVELS):
            opened = denoiser_pb2.OpenDenoise(session_id=SESSION.id, level=number)
            connector = level_connector(pool, opened, DIGEST)
            connector.session = serialize_session(denoiser_pb2.OpenDenoise, SESSION, motion)
            levels.append(FailoverStage(connector, TIMEOUTS))
            await levels[-1].open()
        decoder = Decoder(changes_often)
        stages = SessionStages(
            cast(Any, Encoder(block_s)),
            levels,
            cast(Any, decoder),
            remaining_s=[0.0] * (NUM_LEVELS + 2),
            sink_update_block=CONFIG.sink_update_block,
        )
        first = conditions_to_pb(Conditions(0, torch.zeros(2, 1, SIDE, SIDE), torch.zeros(0, CONFIG.text_dim)))
        decoder.stream = stream = LiveStream(
            stages, OFFLINE, SESSION, types_pb2.Position(next_frame=3), first, GatewaySettings(audio_ahead_s=60.0)
        )
        stream.connect()
        async with background(stream.outbox.drain(_ignore)):
            for request in [*pieces(bytes(NUM_BLOCKS * BLOCK_BYTES)), CLOSE]:
                await stream.receive(request)
            await stream.run()
        for level in levels:
            level.close()
        return decoder


async def _ignore(_: Any) -> None:
    pass


def check(decoder: Decoder, block_s: float, latency_s: float) -> None:
    """Check the gaps between blocks. block_s: between two blocks in a steady state. latency_s: of one block."""
    ended_s = decoder.ended_s
    assert len(ended_s) == NUM_BLOCKS
    assert decoder.prompt_block > PROMPT_BLOCK
    assert ended_s[0] <= PREFILL_S + latency_s + EPSILON_S, "all levels prefill at once, before the first block"
    gaps_s = [after - before for before, after in pairwise(ended_s)]
    longest = max(range(len(gaps_s)), key=gaps_s.__getitem__)
    assert gaps_s[longest] <= block_s + PREFILL_S + EPSILON_S, (longest, gaps_s)
    assert decoder.num_prefills == 3, "the picture's, the sink update's and the prompt's"


async def test_levels_on_four_devices_prefill_at_once(store: SessionStore) -> None:
    async with AsyncExitStack() as stack:
        targets = []
        for level in range(NUM_LEVELS):
            denoiser = event_time.servicer([level], store, stack.enter_context(DeviceQueue()))
            targets.append(f"127.0.0.1:{await stack.enter_async_context(serving('127.0.0.1:0', denoiser))}")
        check(await decoded(targets), STEP_S, NUM_LEVELS * STEP_S)


async def test_levels_of_one_process_share_a_prefill(store: SessionStore) -> None:
    block_s = NUM_LEVELS * STEP_S + PREFILL_S
    with DeviceQueue() as queue:
        denoiser = event_time.servicer([*range(NUM_LEVELS)], store, queue)
        async with serving("127.0.0.1:0", denoiser) as port:
            check(await decoded([f"127.0.0.1:{port}"], block_s), block_s, NUM_LEVELS * STEP_S)


async def test_a_prompt_for_every_block_costs_levels_of_one_process_at_most_a_prefill_each(store: SessionStore) -> None:
    """Gaps are not compared: the device is full, and when prompts arrive depends on the machine."""
    block_s = NUM_LEVELS * STEP_S + PREFILL_S
    with DeviceQueue() as queue:
        denoiser = event_time.servicer([*range(NUM_LEVELS)], store, queue)
        async with serving("127.0.0.1:0", denoiser) as port:
            decoder = await decoded([f"127.0.0.1:{port}"], block_s, changes_often=True)
    assert len(decoder.ended_s) == NUM_BLOCKS
    assert decoder.num_prefills <= 2 + NUM_BLOCKS - PROMPT_BLOCK, "the picture's, the sink update's, one a prompt"


@pytest.mark.slow
async def test_levels_in_four_processes_prefill_at_once(redis: str, tmp_path: Path) -> None:
    targets = {f"level {level}": f"127.0.0.1:{port}" for level, port in enumerate(free_ports(NUM_LEVELS))}
    async with Suite(tmp_path, redis, targets) as suite:
        for level, (name, target) in enumerate(targets.items()):
            settings = {"AVATAR_REDIS_URL": redis, "AVATAR_LISTEN": target, "AVATAR_LEVELS": str(level)}
            await suite.start(name, sys.executable, "-m", "tests.services.event_time", **settings)
        await until_healthy(suite)
        check(await decoded([*targets.values()]), STEP_S, NUM_LEVELS * STEP_S)
