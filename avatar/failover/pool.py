"""The workers of one kind: where they are, what they say of themselves, and which takes the next stream.

A name that resolves to several addresses is several workers. Each is asked once a second what it serves and how much
it has to do; one that does not answer gets no stream, and those that it has are told. Workers come and go while streams
run.
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

from avatar.aio import background
from avatar.errors import AvatarError, NoCapacity, StageFailed, StageLost, StoreUnavailable
from avatar.rpc.channel import channel

logger = logging.getLogger(__name__)
Info = TypeVar("Info", bound=Message)
Opened = TypeVar("Opened")

ASK_EVERY_S = 1.0
# Its loop answers within milliseconds however busy its device is; a process that is stopped does not.
ANSWER_S = 2.0
RETRY_S = 1.0


class Worker(Generic[Info]):
    """One worker, as this process sees it.

    target: HOST:PORT. info: what it said last; None while it does not answer. num_open: streams of this process there.
    on_silence: called when it has stopped answering, for the streams that it has. is_listed: it is at an address of
    the pool's. chain: that it belongs to; a chain's streams are counted at one of its workers.
    """

    def __init__(self, target: str, connection: grpc.aio.Channel) -> None:
        self.target = target
        self.channel = connection
        self.info: Info | None = None
        self.num_open = 0
        self.on_silence: set[Callable[[], None]] = set()
        self.is_listed = True
        self.chain = ""
        self._num_others = 0

    @property
    def load(self) -> tuple[float, int]:
        """The share of its streams that are taken, as far as is known here, and how many that are."""
        taken = self._num_others + self.num_open
        return taken / max(1, getattr(self.info, "capacity", 0)), taken

    def heard(self, info: Info) -> None:
        """It has answered."""
        self.info, self.chain = info, getattr(info, "chain", "")
        self._num_others = max(0, getattr(info, "active", 0) - self.num_open)

    def lost(self) -> None:
        """It cannot be reached: nothing is opened there until it answers again."""
        self.info = None

    def silent(self) -> None:
        """It is there and does not answer."""
        self.lost()
        for tell in [*self.on_silence]:
            tell()


class WorkerPool(Generic[Info]):
    """All workers of a kind.

    stage: what errors call them. targets: HOST:PORT or NAME:PORT of each. ask: what asks one at the end of a channel.
    credentials: for TLS; a certificate is for the target's name, whichever of its addresses shows it.
    """

    def __init__(
        self,
        stage: str,
        targets: Sequence[str],
        ask: Callable[[grpc.aio.Channel], Awaitable[Info]],
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self.stage = stage
        self._targets = targets
        self._ask_at = ask
        self._credentials = credentials
        self._workers: dict[str, Worker[Info]] = {}
        self._asking = asyncio.Lock()

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """Know the workers while the body runs."""
        try:
            async with background(self._ask_on()):
                yield
        finally:
            for worker in self._workers.values():
                await worker.channel.close()

    async def workers(self, serves: Callable[[Info], bool] = lambda _: True) -> list[tuple[Worker[Info], Info]]:
        """Those that answer and serve what is asked, the least loaded first. StageLost if there is none."""
        found = self.answering(serves)
        if not found:
            await self.ask()
            found = self.answering(serves)
        if not found:
            raise self._lost(f"no worker answers at {', '.join(self._targets)}")
        return sorted(found, key=lambda each: each[0].load)

    async def open(
        self,
        open_at: Callable[[Worker[Info]], Awaitable[Opened]],
        serves: Callable[[Info], bool] = lambda _: True,
    ) -> tuple[Worker[Info], Opened]:
        """Open a stream at the least loaded worker that takes it.

        Raises what one of them said if none does: NoCapacity if there was one that is full.
        """
        refusal: AvatarError | None = None
        for worker, _ in await self.workers(serves):
            if worker.info is None:  # since it was looked up
                refusal = refusal or self._lost(f"{worker.target} is gone")
                continue
            worker.num_open += 1
            is_open = False
            try:
                opened = await open_at(worker)
                is_open = True
                return worker, opened
            except NoCapacity as error:
                refusal = error
            except (StageLost, StageFailed, StoreUnavailable) as error:
                worker.lost()  # until it is asked again: others go first
                refusal = refusal or error
            finally:
                worker.num_open -= not is_open
        assert refusal is not None
        raise refusal

    async def call(self, ask_at: Callable[[Worker[Info]], Awaitable[Opened]]) -> Opened:
        """The answer of the least loaded worker that gives one. Raises as `open`."""
        worker, answer = await self.open(ask_at)
        worker.num_open -= 1
        return answer

    async def ask(self) -> None:
        """Look where workers are and ask each. Returns when all have answered, or are known not to."""
        async with self._asking:
            await self._look()
            await asyncio.gather(*(self._ask(worker) for worker in [*self._workers.values()]))

    def answering(self, serves: Callable[[Info], bool]) -> list[tuple[Worker[Info], Info]]:
        """Those that answered when they were asked last, and serve what is asked."""
        return [
            (worker, worker.info)
            for worker in self._workers.values()
            if worker.is_listed and worker.info is not None and serves(worker.info)
        ]

    def _lost(self, why: str) -> StageLost:
        return StageLost(f"{self.stage}: {why}", metadata={"stage": self.stage}, retry_s=RETRY_S)

    async def _ask_on(self) -> None:
        while True:
            await self.ask()
            await asyncio.sleep(ASK_EVERY_S)

    async def _ask(self, worker: Worker[Info]) -> None:
        try:
            worker.heard(await self._ask_at(worker.channel))
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                worker.silent()
            else:  # it is gone, which its streams notice, or it drains, and they end in peace
                worker.lost()

    async def _look(self) -> None:
        """Workers at all addresses that the names have now. A name that cannot be resolved keeps those it had."""
        found: dict[str, str] = {}
        for target in self._targets:
            try:
                found |= await _addresses(target)
            except OSError:
                logger.warning("name not resolved", extra={"target": target})
                found |= dict.fromkeys(self._workers, "")
        for address, name in found.items():
            if address not in self._workers:
                self._workers[address] = Worker(address, channel(address, self._credentials, name=name))
        busy = {worker.chain for worker in self._workers.values() if worker.num_open and worker.chain}
        for address, worker in [*self._workers.items()]:
            worker.is_listed = address in found
            if not (worker.is_listed or worker.num_open or worker.chain in busy):
                await self._workers.pop(address).channel.close()


async def _addresses(target: str) -> dict[str, str]:
    """HOST:PORT of every address that a target's name has, and the name."""
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
