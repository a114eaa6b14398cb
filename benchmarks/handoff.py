"""The cost of a hop from level to level: latents in messages through the caller, against latents handed over.

`rows` starts a chain of stand-in workers, `python -m benchmarks.handoff LEVEL LISTEN MEETING`, which wait STEP_S for
each block; the rest of a block's time is the hops'. Blocks pass one at a time, both paths in turns, at the same
workers.
"""

import asyncio
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import grpc.aio
from tqdm import tqdm

from avatar.handoff.chain import Chain, ChainMember, join_chain
from avatar.handoff.client import RemoteChain
from avatar.rpc.channel import channel
from avatar.rpc.client import RemoteStage, remote_denoiser
from avatar.rpc.codec import block_from_wire, latent_to_wire, tensor_from_pb
from avatar.rpc.interceptor import Context, parts, receive_open
from avatar.rpc.server import serving, until_stopped
from avatar.rpc.wire import FIELDS, RelayedBlock, serialize_field
from avatar.runtime.pipeline import Stage
from avatar.types import Block
from avatar.worker.v1 import denoiser_pb2 as pb
from avatar.worker.v1 import denoiser_pb2_grpc, types_pb2
from benchmarks.pipeline.processes import cpu_seconds
from benchmarks.row import Row, row
from services.local.processes import Suite, free_ports

Blocks: TypeAlias = AsyncGenerator[RelayedBlock, None]

NUM_LEVELS, STEP_S = 4, 0.02
NUM_TURNS, BLOCKS_PER_TURN = 6, 10
START_S = 120.0
# Shapes of the public 14B network at 720x400, in bfloat16.
FEATURES = serialize_field(
    FIELDS["features"].number, types_pb2.Tensor(dtype="bfloat16", shape=(25, 1024, 12), data=bytes(614_400))
)
LATENT = tensor_from_pb(types_pb2.Tensor(dtype="bfloat16", shape=(16, 3, 50, 90), data=bytes(432_000)))


class Level(denoiser_pb2_grpc.DenoiserServiceServicer):
    """A level that waits and adds one to every element."""

    service_name = "avatar.worker.v1.DenoiserService"

    def __init__(self, level: int, chain: Chain) -> None:
        self._level, self._chain = level, chain
        self._device = ThreadPoolExecutor(1)

    def add_to(self, server: grpc.aio.Server) -> None:
        denoiser_pb2_grpc.add_DenoiserServiceServicer_to_server(self, server)

    async def GetInfo(  # noqa: N802
        self, _: pb.DenoiserServiceGetInfoRequest, __: Context
    ) -> pb.DenoiserServiceGetInfoResponse:
        return pb.DenoiserServiceGetInfoResponse(levels=[self._level], num_levels=NUM_LEVELS, chain=self._chain.name)

    async def Denoise(  # noqa: N802
        self, requests: AsyncIterator[pb.DenoiseRequest], _: Context
    ) -> AsyncGenerator[Any, None]:
        opened: pb.OpenDenoise = await receive_open(requests)
        with self._chain.open_stream(opened.handoff, opened.level) if opened.handoff else nullcontext() as link:
            yield pb.DenoiseResponse(opened=pb.DenoiseOpened())
            async for message in parts(requests, "block"):
                block = block_from_wire(message, None)
                block = await link.receive(block) if link else block
                block = await asyncio.get_running_loop().run_in_executor(self._device, self._step, block)
                yield latent_to_wire(link.hand_over(block) if link else block)
            yield pb.DenoiseResponse(closed=types_pb2.Closed())

    def _step(self, block: Block) -> Block:
        end = time.monotonic() + STEP_S
        latent = (block.latent if self._level and block.latent is not None else LATENT) + 1
        time.sleep(max(0.0, end - time.monotonic()))
        return replace(block, latent=latent)


async def work(level: int, listen: str, meeting: str) -> None:
    """Run a worker."""
    member = ChainMember([level], NUM_LEVELS, "stand-in", LATENT.dtype, LATENT.device)
    async with join_chain(meeting, member) as chain, serving(listen, Level(level, chain)):
        await until_stopped()


class HopPath:
    """One path through the levels, a block at a time."""

    def __init__(self, stage: Stage[RelayedBlock, RelayedBlock]):
        self._requests: asyncio.Queue[RelayedBlock] = asyncio.Queue()
        self._answers = stage(self._blocks())
        self._index = 0
        self.hops_ms: list[float] = []
        self.cpu_ms = 0.0

    async def turn(self, pids: list[int]) -> None:
        """Pass some blocks, one after another."""
        cpu_s = cpu_seconds(pids)
        for _ in range(BLOCKS_PER_TURN):
            started = time.perf_counter()
            self._requests.put_nowait(RelayedBlock(types_pb2.Block(index=self._index), FEATURES))
            answer = await anext(self._answers)
            self.hops_ms.append((time.perf_counter() - started - NUM_LEVELS * STEP_S) * 1000 / NUM_LEVELS)
            assert tensor_from_pb(answer.to_pb().latent).eq(NUM_LEVELS).all()
            self._index += 1
        self.cpu_ms += (cpu_seconds(pids) - cpu_s) * 1000

    def rows(self, name: str) -> list[Row]:
        """Return the wall time and CPU time of a hop."""
        num_hops = NUM_TURNS * BLOCKS_PER_TURN * NUM_LEVELS
        wall = row(f"hop, latents {name}", median(self.hops_ms), "ms")
        return [wall, row(f"hop, latents {name}, CPU time", self.cpu_ms / num_hops, "ms")]

    async def close(self) -> None:
        await self._answers.aclose()

    async def _blocks(self) -> Blocks:
        while True:
            yield await self._requests.get()


def in_messages(levels: list[RemoteStage[Any, RelayedBlock]]) -> Stage[RelayedBlock, RelayedBlock]:
    """Return a stage of all levels in a row, as the gateway composes them."""

    def stage(blocks: Blocks) -> Blocks:
        for level in levels:
            blocks = _with_features(level(blocks))
        return blocks

    return stage


async def _with_features(answers: Blocks) -> Blocks:
    async with aclosing(answers):
        async for answer in answers:
            yield replace(answer, inputs=FEATURES)


async def measure() -> dict[str, HopPath]:
    """Measure both paths."""
    meeting, *ports = free_ports(1 + NUM_LEVELS)
    targets = {str(level): f"127.0.0.1:{port}" for level, port in enumerate(ports)}
    async with AsyncExitStack() as stack:
        suite = Suite(Path(stack.enter_context(TemporaryDirectory())), "", targets)
        stack.push_async_callback(suite.stop)
        for name, target in targets.items():
            program = (sys.executable, "-m", "benchmarks.handoff", name, target, f"127.0.0.1:{meeting}")
            await suite.start(name, *program)
        channels = [await stack.enter_async_context(channel(target)) for target in targets.values()]
        async with asyncio.timeout(START_S):
            for each in channels:
                await each.channel_ready()
        levels = [remote_denoiser(each, level) for level, each in enumerate(channels)]
        for level, stage in enumerate(levels):
            await stage.open(pb.OpenDenoise(session_id="in messages", level=level))
        chain = RemoteChain(channels)
        await chain.open(pb.OpenDenoise(session_id="handed over"))
        paths = {"in messages": HopPath(in_messages(levels)), "handed over": HopPath(chain)}
        pids = [process.pid for process in suite.processes.values()]
        for path in paths.values():  # the first turn is not counted
            await path.turn(pids)
            path.hops_ms, path.cpu_ms = [], 0.0
        for _ in tqdm(range(NUM_TURNS), desc="hops", disable=None):
            for path in paths.values():
                await path.turn(pids)
        for path in paths.values():
            await path.close()
        return paths


def rows() -> list[Row]:
    """Measure a hop on each path, and their ratio."""
    paths = asyncio.run(measure())
    messages, handed = (median(path.hops_ms) for path in paths.values())
    per_path = [each for name, path in paths.items() for each in path.rows(name)]
    return [*per_path, row("hop, messages to hand-over", messages / handed, "")]


if __name__ == "__main__":
    asyncio.run(work(int(sys.argv[1]), *sys.argv[2:]))
