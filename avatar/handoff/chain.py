"""A chain: the processes that serve a checkpoint's levels, each once, and hand latents to each other.

    level 0 --give--> thread =torch.distributed=> thread --take--> level 1 --give--> ... --take--> the last level

The processes meet once, at their start, and are one process group until the first of them ends: then every other one
ends too, and whoever runs them starts all anew. Rank r sends to rank r + 1 alone. Ahead of each latent goes a header
with its stream, level, index and shape, so that sessions share a pair of ranks and order among them does not matter;
it travels over gloo on any device, and says each second that its sender lives. Latents travel over NCCL from one CUDA
device to another, and over gloo elsewhere.

Axes: c latent channels, t latent frames, h w height and width.
"""

import asyncio
import logging
import queue
import threading
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # documented, not exported

from avatar.errors import InvalidField, StageLost
from avatar.types import Block

logger = logging.getLogger(__name__)

# Processes load their weights, and perhaps their images, before they meet.
MEET_S = 1800.0
# The group is made by processes that have met. NCCL's own watchdog ends a process whose transfer takes longer.
GROUP_S = 30.0
BEAT_S = 1.0
# A neighbour that says nothing for so long, or takes nothing, is lost. One that was killed is noticed at once.
SILENCE_S = 5.0
# A block is sent to all levels at once, and waits for the levels before; the chain's end wakes it sooner.
TAKE_S = 120.0
HEADER_NUMBERS = 7


@dataclass(frozen=True)
class Seat:
    """What a process brings to a chain; what is not its levels must be the same at all of them.

    levels: that it serves, ascending and without a gap. num_levels: of the checkpoint. digest: of its network.
    """

    levels: list[int]
    num_levels: int
    digest: str
    dtype: torch.dtype
    device: torch.device


class Link:
    """One stream's end at its level. Every block is taken, made and given, in order."""

    def __init__(self, chain: "Chain", handoff: int, level: int) -> None:
        self._chain, self._handoff, self._level = chain, handoff, level
        # Filled by the level before, at most as far as the contract lets the caller go ahead.
        self.handed: asyncio.Queue[tuple[int, Tensor] | None] = asyncio.Queue(2 * chain.num_levels)

    async def take(self, block: Block) -> Block:
        """The block with the latent (c, t, h, w) that the level before handed over; as it is at level 0.

        StageLost if none comes because the chain has broken; ValueError if it is another block's.
        """
        if self._level == 0:
            return block
        self._chain.check()
        try:
            async with asyncio.timeout(TAKE_S):
                handed = await self.handed.get()
        except TimeoutError as error:
            raise StageLost(f"block {block.index} was not handed over within {TAKE_S:g} s", retry_s=1.0) from error
        if handed is None:
            raise self._chain.broken()
        index, latent = handed
        if index != block.index:
            raise ValueError(f"block {index} was handed over, expected {block.index}")
        return replace(block, latent=latent)

    def give(self, block: Block) -> Block:
        """Hand the block's latent to the next level; what is left of it, all at the last. StageLost if it cannot."""
        if self._level == self._chain.num_levels - 1:
            return block
        assert block.latent is not None
        self._chain.hand((self._handoff, self._level + 1), block.index, block.latent)
        return replace(block, latent=None)


class Chain:
    """This process's place in a chain. Lives in the event loop; two threads of its own wait for the neighbours.

    name: the chain's, another at each start.
    """

    def __init__(self, name: str, seat: Seat) -> None:
        self.name, self.num_levels = name, seat.num_levels
        self._seat = seat
        self._loop = asyncio.get_running_loop()
        self._links: dict[tuple[int, int], Link] = {}
        self._outgoing: queue.SimpleQueue[tuple[list[int], Tensor] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._closing = threading.Event()
        self._lost = asyncio.Event()
        self._why = ""

    @contextmanager
    def link(self, handoff: int, level: int) -> Iterator[Link]:
        """The end of a stream, while the body runs: what is handed to it later is dropped.

        InvalidField if there is one already; StageLost if the chain has broken.
        """
        self.check()
        if (handoff, level) in self._links:
            raise InvalidField.at("open.handoff", f"{handoff} is open at level {level} already")
        self._links[handoff, level] = link = Link(self, handoff, level)
        try:
            yield link
        finally:
            del self._links[handoff, level]

    def hand(self, to: tuple[int, int], index: int, latent: Tensor) -> None:
        """Hand a latent to a stream's level, here or in the next process."""
        self.check()
        if to[1] in self._seat.levels:
            self._deliver(to, index, latent)
        else:
            self._outgoing.put(([*to, index, *latent.shape], latent))

    def check(self) -> None:
        """StageLost if the chain has broken."""
        if self._lost.is_set():
            raise self.broken()

    def broken(self) -> StageLost:
        return StageLost(f"the chain has broken: {self._why}", retry_s=1.0)

    async def until_lost(self) -> None:
        """Wait for the chain to break."""
        await self._lost.wait()

    def start(self, rank: int, size: int) -> None:
        """Begin to listen to the neighbours; the process group is there."""
        works = [*([self._receive] if rank else []), *([self._send] if rank + 1 < size else [])]
        self._threads = [threading.Thread(target=self._guarded, args=(work, rank), daemon=True) for work in works]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Leave. A thread of torch that still waited would abort the process: they end within SILENCE_S."""
        self._closing.set()
        self._outgoing.put(None)
        for thread in self._threads:
            thread.join()

    def _deliver(self, to: tuple[int, int], index: int, latent: Tensor) -> None:
        link = self._links.get(to)
        if link is not None and not link.handed.full():  # one that misses a block finds out at the next
            link.handed.put_nowait((index, latent))

    def _guarded(self, work: Callable[[int], None], rank: int) -> None:
        try:
            # A transfer waits for what its stream was told before: not the steps' own, which are a block ahead of it.
            with torch.cuda.stream(_stream_of(self._seat.device)):
                work(rank)
        except Exception as error:  # torch raises RuntimeError for what a neighbour does, and for its own defects
            self._loop.call_soon_threadsafe(self._lose, str(error))

    def _lose(self, why: str) -> None:
        if self._lost.is_set():
            return
        self._why = why.splitlines()[0]
        logger.error("chain broken", extra={"chain": self.name, "why": self._why})
        self._lost.set()
        for link in self._links.values():
            if not link.handed.full():  # a full one is not waited for, and looks before it takes the next
                link.handed.put_nowait(None)

    def _send(self, rank: int) -> None:
        """Pass on what is handed over, and a sign of life where nothing is."""
        while True:
            try:
                handed = self._outgoing.get(timeout=BEAT_S)
            except queue.Empty:
                handed = [0] * HEADER_NUMBERS, torch.empty(0)
            if handed is None:
                return
            numbers, latent = handed
            _wait(dist.isend(torch.tensor(numbers), rank + 1))
            if latent.numel():
                _wait(dist.isend(latent := latent.contiguous(), rank + 1), latent)

    def _receive(self, rank: int) -> None:
        header = torch.zeros(HEADER_NUMBERS, dtype=torch.int64)
        while not self._closing.is_set():
            _wait(dist.irecv(header, rank - 1))
            handoff, level, index, *shape = header.tolist()
            if handoff:
                latent = torch.empty(shape, dtype=self._seat.dtype, device=self._seat.device)
                _wait(dist.irecv(latent, rank - 1), latent)
                self._loop.call_soon_threadsafe(self._deliver, (handoff, level), index, latent)


@asynccontextmanager
async def joined(address: str, seat: Seat) -> AsyncGenerator[Chain, None]:
    """This process's place in the chain that meets at HOST:PORT, from when all are there and while the body runs.

    The process of level 0 listens at the address. ValueError if the processes do not make a chain, or do not come.
    """
    try:
        store, name, heads = await asyncio.to_thread(_meet, address, seat)
        ranks = sorted(set(heads))
        rank, size = ranks.index(seat.levels[0]), len(ranks)
        if size > 1:
            await asyncio.to_thread(_make_group, store, rank, size, seat.device)
    except dist.DistError as error:
        raise ValueError(f"the chain did not meet at {address}: {str(error).splitlines()[0]}") from error
    chain = Chain(name, seat)
    chain.start(rank, size)
    logger.info("joined a chain", extra={"chain": name, "rank": rank, "size": size})
    try:
        yield chain
    finally:
        await asyncio.to_thread(chain.stop)
        if size > 1:
            dist.destroy_process_group()


def _meet(address: str, seat: Seat) -> tuple[TCPStore, str, list[int]]:
    """The store of the chain, its name, and of every level the first one of the process that serves it."""
    host, _, port = address.rpartition(":")
    limit = timedelta(seconds=MEET_S)
    store = TCPStore(host, int(port), is_master=0 in seat.levels, wait_for_workers=False, timeout=limit)
    for level in seat.levels:
        # A chain is never joined again: who is restarted alone meets the old one, until that has ended.
        if store.add(f"taken/{level}", 1) > 1:
            raise ValueError(f"level {level} is taken in the chain at {address}")
    if 0 in seat.levels:
        store.set("name", uuid.uuid4().hex)
    for level in seat.levels:
        store.set(f"level/{level}", f"{seat.levels[0]} {seat.digest} {seat.dtype}")
    told = [store.get(f"level/{level}").decode().split(" ", 1) for level in range(seat.num_levels)]
    heads = [int(head) for head, _ in told]
    if heads != sorted(heads):
        raise ValueError(f"the processes of a chain serve levels that follow each other, got {heads}")
    if len(brought := {what for _, what in told}) > 1:
        raise ValueError(f"the processes of a chain serve one network, got {', '.join(sorted(brought))}")
    return store, store.get("name").decode(), heads


def _make_group(store: TCPStore, rank: int, size: int, device: torch.device) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(seconds=GROUP_S)
    dist.init_process_group(backend, store=PrefixStore("group", store), rank=rank, world_size=size, timeout=limit)


def _stream_of(device: torch.device) -> torch.cuda.Stream | None:
    """A stream of one's own on a CUDA device; None elsewhere."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def _wait(work: Any, latent: Tensor | None = None) -> None:
    """Wait for a transfer. RuntimeError if the neighbour has gone or does not take part within SILENCE_S."""
    work.wait(timedelta(seconds=SILENCE_S))
    if latent is not None and latent.is_cuda:  # NCCL has only told the stream to wait
        torch.cuda.current_stream(latent.device).synchronize()
