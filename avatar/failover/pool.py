"""The workers of one kind: discovery, health checks, and the choice of a worker for a new stream.

A name that resolves to several addresses is several workers. Each is asked once a second what it serves and how many
streams it has; one that does not answer gets no new stream, and its open streams are notified. Workers come and go
while streams run.
"""

import asyncio
import ipaddress
import logging
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

import grpc.aio
from google.protobuf.message import Message

from avatar import telemetry
from avatar.aio import background
from avatar.errors import AvatarError, NoCapacity, StageFailed, StageLost, StoreUnavailable
from avatar.rpc.channel import channel

logger = logging.getLogger(__name__)
Info = TypeVar("Info", bound=Message)
Opened = TypeVar("Opened")

POLL_EVERY_S = 1.0
# A worker's event loop answers within milliseconds however busy its device is; a stopped process does not.
ANSWER_S = 2.0
RETRY_S = 1.0


class Worker(Generic[Info]):
    """One worker, as this process sees it.

    target: HOST:PORT. info: its last answer; None while it does not answer. num_streams: this process's streams there.
    on_silence: callbacks of those streams, called when the worker stops answering. is_listed: the pool's names resolve
    to its address. chain: name of its chain; a chain's streams are counted at one of its workers.
    """

    def __init__(self, target: str, connection: grpc.aio.Channel) -> None:
        self.target = target
        self.channel = connection
        self.info: Info | None = None
        self.num_streams = 0
        self.on_silence: set[Callable[[], None]] = set()
        self.is_listed = True
        self.chain = ""
        self._num_others = 0

    @property
    def load(self) -> tuple[float, int]:
        """Share of its capacity that is in use, as of its last answer, and the number of its streams."""
        num_streams = self._num_others + self.num_streams
        return num_streams / max(1, getattr(self.info, "capacity", 0)), num_streams

    def update(self, info: Info) -> None:
        """Store an answer."""
        self.info, self.chain = info, getattr(info, "chain", "")
        self._num_others = max(0, getattr(info, "active", 0) - self.num_streams)

    def mark_lost(self) -> None:
        """Open no stream at the worker until it answers again."""
        self.info = None

    def mark_silent(self) -> None:
        """Mark a worker that is reachable but does not answer as lost, and notify its streams."""
        self.mark_lost()
        for notify in [*self.on_silence]:
            notify()


class WorkerPool(Generic[Info]):
    """All workers of a kind.

    stage: name that errors carry. targets: HOST:PORT or NAME:PORT of each. get_info: asks the worker at the end of a
    channel what it serves. credentials: for TLS; a certificate is for the target's name, at each of its addresses.
    """

    def __init__(
        self,
        stage: str,
        targets: Sequence[str],
        get_info: Callable[[grpc.aio.Channel], Awaitable[Info]],
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self.stage = stage
        self._targets = targets
        self._get_info = get_info
        self._credentials = credentials
        self._workers: dict[str, Worker[Info]] = {}
        self._addresses_of: dict[str, set[str]] = {}
        self._polling = asyncio.Lock()
        telemetry.STREAMS_REBUILT.add(0, {"stage": stage})

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """Poll the workers while the body runs."""
        try:
            async with background(self._poll_forever()):
                yield
        finally:
            for worker in self._workers.values():
                await worker.channel.close()

    async def workers(self, serves: Callable[[Info], bool] = lambda _: True) -> list[tuple[Worker[Info], Info]]:
        """Return the workers that answer and serve what is asked, least loaded first. StageLost if there is none."""
        found = self.answering(serves)
        if not found:
            await self.poll()
            found = self.answering(serves)
        if not found:
            raise self._lost(f"no worker answers at {', '.join(self._targets)}")
        return sorted(found, key=lambda each: each[0].load)

    async def open(
        self,
        open_at: Callable[[Worker[Info]], Awaitable[Opened]],
        serves: Callable[[Info], bool] = lambda _: True,
        first: str = "",
    ) -> tuple[Worker[Info], Opened]:
        """Open a stream at the least loaded worker that takes it. The caller decrements `num_streams` when it ends.

        first: HOST:PORT of a worker to try before all others. If no worker takes it, raises the error of one:
        NoCapacity if any of them is full.
        """
        refusal: AvatarError | None = None
        for worker, _ in sorted(await self.workers(serves), key=lambda each: each[0].target != first):
            if worker.info is None:  # lost since the list was made
                refusal = refusal or self._lost(f"{worker.target} is gone")
                continue
            worker.num_streams += 1
            is_open = False
            try:
                opened = await open_at(worker)
                is_open = True
                return worker, opened
            except NoCapacity as error:
                refusal = error
            except (StageLost, StageFailed, StoreUnavailable) as error:
                worker.mark_lost()  # until it answers again: others are tried first
                refusal = refusal or error
            finally:
                worker.num_streams -= not is_open
        assert refusal is not None
        raise refusal

    async def call(self, call_at: Callable[[Worker[Info]], Awaitable[Opened]]) -> Opened:
        """Return the answer of the least loaded worker that gives one. Raises as `open` does."""
        worker, answer = await self.open(call_at)
        worker.num_streams -= 1
        return answer

    async def poll(self) -> None:
        """Resolve the targets and ask every worker. Returns when each has answered or failed to."""
        async with self._polling:
            await self._resolve()
            await asyncio.gather(*(self._poll(worker) for worker in [*self._workers.values()]))
            for target, addresses in self._addresses_of.items():
                num_workers = sum(self._workers[address].info is not None for address in addresses)
                telemetry.WORKERS.set(num_workers, {"target": target})

    def answering(self, serves: Callable[[Info], bool]) -> list[tuple[Worker[Info], Info]]:
        """Return the workers that answered the last poll and serve what is asked."""
        return [
            (worker, worker.info)
            for worker in self._workers.values()
            if worker.is_listed and worker.info is not None and serves(worker.info)
        ]

    def _lost(self, why: str) -> StageLost:
        return StageLost(f"{self.stage}: {why}", metadata={"stage": self.stage}, retry_s=RETRY_S)

    async def _poll_forever(self) -> None:
        while True:
            await self.poll()
            await asyncio.sleep(POLL_EVERY_S)

    async def _poll(self, worker: Worker[Info]) -> None:
        try:
            worker.update(await self._get_info(worker.channel))
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                worker.mark_silent()
            else:  # gone, which its streams notice by themselves, or draining, which lets its streams end
                worker.mark_lost()

    async def _resolve(self) -> None:
        """Update the list of workers from the targets' addresses. A name that cannot be resolved keeps its workers."""
        found: dict[str, str] = {}
        for target in self._targets:
            try:
                addresses = await _addresses(target)
            except OSError:
                logger.warning("name not resolved", extra={"target": target})
                addresses = dict.fromkeys(self._addresses_of.get(target, ()), "")
            self._addresses_of[target] = set(addresses)
            found |= addresses
        for address, name in found.items():
            if address not in self._workers:
                self._workers[address] = Worker(address, channel(address, self._credentials, name=name))
        busy_chains = {worker.chain for worker in self._workers.values() if worker.num_streams and worker.chain}
        for address, worker in [*self._workers.items()]:
            worker.is_listed = address in found
            if not (worker.is_listed or worker.num_streams or worker.chain in busy_chains):
                await self._workers.pop(address).channel.close()


async def _addresses(target: str) -> dict[str, str]:
    """Return HOST:PORT of every address of a target, each with the target's name; no name if it is an address."""
    host, _, port = target.removeprefix("dns:///").rpartition(":")
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(ANSWER_S):  # TimeoutError is an OSError
            found = await loop.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
        hosts = [f"[{where[0]}]" if family == socket.AF_INET6 else where[0] for family, *_, where in found]
        return {f"{each}:{port}": host for each in hosts}
    return {f"{host}:{port}": ""}
