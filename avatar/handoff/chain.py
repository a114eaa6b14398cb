"""A chain: the processes that serve a checkpoint's levels, each level once, and hand latents to each other.

    level 0 --hand over--> thread =torch.distributed=> thread --receive--> level 1 --hand over--> ... --> the last level

The processes meet once, when they start, and form one process group until the first of them ends; then every other one
ends too, and its supervisor restarts it. Rank r sends to rank r + 1 only. A header precedes each latent, with its
stream, level, index and shape, so that sessions share a pair of ranks and their order does not matter. Headers travel
over gloo on any device, and serve as heartbeats once a second. So do latents, through pinned memory of the host where
levels run on GPUs; or they travel over NCCL, if its members choose that. One exchange of both kinds when the group is
formed connects all pairs of ranks before the first block.

Axes: c latent channels, t latent frames, h w height and width.
"""

import asyncio
import logging
import queue
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # documented, not exported

from avatar.errors import InvalidField, StageLost
from avatar.types import Block

logger = logging.getLogger(__name__)

# Processes load their weights, and perhaps pull their images, before they meet.
RENDEZVOUS_S = 1800.0
# Timeout of the group's formation, after the rendezvous.
GROUP_S = 30.0
HEARTBEAT_S = 1.0
# A neighbour that sends or receives nothing for so long is lost. One that was killed is noticed at once.
SILENCE_S = 5.0
# Between two looks at a transfer of NCCL.
POLL_S = 0.0002
# A block is sent to all levels at once and waits for the levels before; a broken chain ends the wait sooner.
RECEIVE_S = 120.0
# Handoff, level, block index and the latent's four axes.
HEADER_LENGTH = 7


@dataclass(frozen=True)
class ChainMember:
    """One process's contribution to a chain. All but the levels must be the same at every member.

    levels: served here, ascending and without a gap. num_levels: of the checkpoint. digest: of its network.
    device: of the levels. backend: of latents between processes, `gloo` or, between GPUs alone, `nccl`.
    """

    levels: list[int]
    num_levels: int
    digest: str
    dtype: torch.dtype
    device: torch.device
    backend: str = "gloo"

    @property
    def latent_device(self) -> torch.device:
        """Device from which latents are sent, and to which they are received."""
        return self.device if self.backend == "nccl" else torch.device("cpu")

    def empty_latent(self, shape: Sequence[int]) -> Tensor:
        """Return a tensor to receive a latent in, pinned if a GPU reads it."""
        device = self.latent_device
        is_pinned = device.type == "cpu" and self.device.type == "cuda"
        return torch.empty(tuple(shape), dtype=self.dtype, device=device, pin_memory=is_pinned)


class ChainStream:
    """One session's stream at one level of a chain. Blocks are received, denoised and handed over in order."""

    def __init__(self, chain: "Chain", handoff: int, level: int) -> None:
        self._chain, self._handoff, self._level = chain, handoff, level
        # Latents from the previous level, at most as many as the protocol lets a caller send ahead; None if the chain
        # has broken.
        self.received: asyncio.Queue[tuple[int, Tensor] | None] = asyncio.Queue(2 * chain.num_levels)

    @property
    def sends_from_host(self) -> bool:
        """True if the level's latents leave this process from the host's memory: all but those for a level here."""
        return self._level == self._chain.num_levels - 1 or self._chain.sends_from_host(self._level + 1)

    async def receive(self, block: Block) -> Block:
        """Return the block with the latent (c, t, h, w) that the previous level handed over; unchanged at level 0.

        StageLost if none arrives or the chain has broken; ValueError if the latent is another block's.
        """
        if self._level == 0:
            return block
        self._chain.check()
        try:
            async with asyncio.timeout(RECEIVE_S):
                received = await self.received.get()
        except TimeoutError as error:
            raise StageLost(f"block {block.index} was not handed over within {RECEIVE_S:g} s", retry_s=1.0) from error
        if received is None:
            raise self._chain.broken()
        index, latent = received
        if index != block.index:
            raise ValueError(f"block {index} was handed over, expected {block.index}")
        return replace(block, latent=latent)

    def hand_over(self, block: Block) -> Block:
        """Hand the block's latent to the next level and return the block without it; unchanged at the last level.

        StageLost if the chain has broken.
        """
        if self._level == self._chain.num_levels - 1:
            return block
        assert block.latent is not None
        self._chain.hand_over((self._handoff, self._level + 1), block.index, block.latent)
        return replace(block, latent=None)


class Chain:
    """This process's end of a chain. Lives in the event loop; two threads of its own exchange with the neighbours.

    name: of the chain, new at each start.
    """

    def __init__(self, name: str, member: ChainMember, rank: int, size: int) -> None:
        """Start the threads of a process group's rank; the group must exist if its size is above 1."""
        self.name, self.num_levels = name, member.num_levels
        self._member = member
        self._loop = asyncio.get_running_loop()
        self._streams: dict[tuple[int, int], ChainStream] = {}
        self._outgoing: queue.SimpleQueue[tuple[list[int], Tensor] | None] = queue.SimpleQueue()
        self._is_stopping = threading.Event()
        self._is_broken = asyncio.Event()
        self._reason = ""
        works = [*([self._receive] if rank else []), *([self._send] if rank + 1 < size else [])]
        self._threads = [threading.Thread(target=self._guarded, args=(work, rank), daemon=True) for work in works]
        for thread in self._threads:
            thread.start()

    @contextmanager
    def open_stream(self, handoff: int, level: int) -> Iterator[ChainStream]:
        """Open a stream at a level while the body runs; latents that arrive for it later are dropped.

        InvalidField if it is open already; StageLost if the chain has broken.
        """
        self.check()
        if (handoff, level) in self._streams:
            raise InvalidField.at("open.handoff", f"{handoff} is open at level {level} already")
        self._streams[handoff, level] = stream = ChainStream(self, handoff, level)
        try:
            yield stream
        finally:
            del self._streams[handoff, level]

    def hand_over(self, to: tuple[int, int], index: int, latent: Tensor) -> None:
        """Hand a latent to a stream (handoff, level) here or in the next process. StageLost if the chain has broken."""
        self.check()
        if to[1] in self._member.levels:
            self._deliver(to, index, latent)
        else:
            self._outgoing.put(([*to, index, *latent.shape], latent))

    def sends_from_host(self, level: int) -> bool:
        """Return whether latents for a level are sent to another process from the host's memory."""
        return level not in self._member.levels and self._member.latent_device.type == "cpu"

    @property
    def is_broken(self) -> bool:
        """True once a neighbour is lost."""
        return self._is_broken.is_set()

    def check(self) -> None:
        """Raise StageLost if the chain has broken."""
        if self._is_broken.is_set():
            raise self.broken()

    def broken(self) -> StageLost:
        """Return the error of a broken chain."""
        return StageLost(f"the chain has broken: {self._reason}", retry_s=1.0)

    async def until_broken(self) -> None:
        """Wait for the chain to break."""
        await self._is_broken.wait()

    def stop(self) -> None:
        """Stop the threads, within SILENCE_S: torch would abort the process if a thread still waited at its end."""
        self._is_stopping.set()
        self._outgoing.put(None)
        for thread in self._threads:
            thread.join()

    def _deliver(self, to: tuple[int, int], index: int, latent: Tensor) -> None:
        stream = self._streams.get(to)
        if stream is not None and not stream.received.full():  # a stream that misses a block fails at the next one
            stream.received.put_nowait((index, latent))

    def _guarded(self, work: Callable[[int], None], rank: int) -> None:
        device = self._member.latent_device
        try:
            # NCCL's transfer waits for the work queued on its CUDA stream. The steps' stream is a block ahead of it.
            stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
            with torch.cuda.stream(stream):
                work(rank)
        except Exception as error:  # torch raises RuntimeError for failures of a neighbour as for its own
            self._loop.call_soon_threadsafe(self._break, str(error))

    def _break(self, reason: str) -> None:
        if self._is_broken.is_set():
            return
        self._reason = reason.splitlines()[0]
        logger.error("chain broken", extra={"chain": self.name, "why": self._reason})
        self._is_broken.set()
        for stream in self._streams.values():
            if not stream.received.full():  # nobody waits at a full queue, and `receive` checks before the next block
                stream.received.put_nowait(None)

    def _send(self, rank: int) -> None:
        """Send latents to the next rank, and a heartbeat where there are none."""
        while True:
            try:
                outgoing = self._outgoing.get(timeout=HEARTBEAT_S)
            except queue.Empty:
                outgoing = [0] * HEADER_LENGTH, torch.empty(0)
            if outgoing is None:
                return
            header, latent = outgoing
            _wait(dist.isend(torch.tensor(header), rank + 1))
            if latent.numel():
                _wait(dist.isend(latent := latent.contiguous(), rank + 1), latent)

    def _receive(self, rank: int) -> None:
        header = torch.zeros(HEADER_LENGTH, dtype=torch.int64)
        while not self._is_stopping.is_set():
            _wait(dist.irecv(header, rank - 1))
            handoff, level, index, *shape = header.tolist()
            if handoff:
                latent = self._member.empty_latent(shape)
                _wait(dist.irecv(latent, rank - 1), latent)
                self._loop.call_soon_threadsafe(self._deliver, (handoff, level), index, latent)


@asynccontextmanager
async def join_chain(address: str, member: ChainMember) -> AsyncGenerator[Chain, None]:
    """Join the chain that meets at HOST:PORT, once all members have arrived, for as long as the body runs.

    The process of level 0 listens at the address. ValueError if the processes do not make a chain, or do not arrive.
    """
    if member.backend == "nccl" and member.device.type != "cuda":
        raise ValueError(f"a chain over nccl needs levels on a GPU, these are on {member.device}")
    try:
        store, name, first_levels = await asyncio.to_thread(_meet, address, member)
        ranks = sorted(set(first_levels))
        rank, size = ranks.index(member.levels[0]), len(ranks)
        if size > 1:
            await asyncio.to_thread(_make_group, store, rank, size, member)
    except RuntimeError as error:  # torch's, for a peer that is lost as for one that does not arrive
        raise ValueError(f"the chain did not meet at {address}: {str(error).splitlines()[0]}") from error
    chain = Chain(name, member, rank, size)
    logger.info("joined a chain", extra={"chain": name, "rank": rank, "size": size})
    try:
        yield chain
    finally:
        await asyncio.to_thread(chain.stop)
        if size > 1 and not chain.is_broken:  # of a broken one, it may wait for the lost peer, and the process ends
            await asyncio.to_thread(dist.destroy_process_group)


def _meet(address: str, member: ChainMember) -> tuple[TCPStore, str, list[int]]:
    """Return the chain's store, its name, and for every level the first level of the process that serves it."""
    host, _, port = address.rpartition(":")
    limit = timedelta(seconds=RENDEZVOUS_S)
    store = TCPStore(host, int(port), is_master=0 in member.levels, wait_for_workers=False, timeout=limit)
    for level in member.levels:
        # A chain is never joined again: a process that restarts alone finds the old chain, until that has ended.
        if store.add(f"taken/{level}", 1) > 1:
            raise ValueError(f"level {level} is taken in the chain at {address}")
    if 0 in member.levels:
        store.set("name", uuid.uuid4().hex)
    for level in member.levels:
        store.set(f"level/{level}", f"{member.levels[0]} {member.digest} {member.dtype} {member.backend}")
    entries = [store.get(f"level/{level}").decode().split(" ", 1) for level in range(member.num_levels)]
    first_levels = [int(first) for first, _ in entries]
    if first_levels != sorted(first_levels):
        raise ValueError(f"the processes of a chain serve levels that follow each other, got {first_levels}")
    if len(networks := {network for _, network in entries}) > 1:
        raise ValueError(f"the processes of a chain serve one network, got {', '.join(sorted(networks))}")
    return store, store.get("name").decode(), first_levels


def _make_group(store: Store, rank: int, size: int, member: ChainMember) -> None:
    """Form the process group, and connect to the neighbours: torch does so at the first exchange of each kind."""
    backend = "cpu:gloo,cuda:nccl" if member.backend == "nccl" else "gloo"
    limit = timedelta(seconds=GROUP_S)
    dist.init_process_group(backend, store=PrefixStore("group", store), rank=rank, world_size=size, timeout=limit)
    for first in (torch.zeros(HEADER_LENGTH, dtype=torch.int64), member.empty_latent([1])):
        if rank:
            _wait(dist.irecv(first, rank - 1), first, GROUP_S)
        if rank + 1 < size:
            _wait(dist.isend(first, rank + 1), first, GROUP_S)


def _wait(work: Any, latent: Tensor | None = None, limit_s: float = SILENCE_S) -> None:
    """Wait for a transfer. RuntimeError if the neighbour has gone or does not take part in time."""
    work.wait(timedelta(seconds=limit_s))
    if latent is None or not latent.is_cuda:
        return
    # NCCL's wait only orders the CUDA stream, and a wait for the stream would have no limit.
    stream, end_s = torch.cuda.current_stream(latent.device), time.monotonic() + limit_s
    while not stream.query():
        if time.monotonic() > end_s:
            raise RuntimeError(f"the neighbour took no part in a transfer for {limit_s:g} s")
        time.sleep(POLL_S)
