"""The workers of one stage: their addresses, what they serve, and the choice of one for a new stream.

    names of the settings -> addresses -> workers -> placement -> stream

A name that resolves to several addresses is several workers. What a worker serves and how many streams it has comes
from the registry (`discovery`). One that is not registered, or was lost, is asked directly, in a task of its own; if it
is silent, it gets no new stream and its open streams are notified. Workers come and go while streams run.
"""

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import cached_property, partial
from typing import Any, Generic, TypeVar

import grpc.aio
from google.protobuf.message import Message

from avatar import telemetry
from avatar.errors import AvatarError, NoCapacity, StageFailed, StageLost, StoreUnavailable
from avatar.failover.addresses import Addresses
from avatar.failover.discovery import Discovery
from avatar.failover.placement import Tries, WorkerLoad, retry_s
from avatar.rpc.channel import channel

logger = logging.getLogger(__name__)
Info = TypeVar("Info", bound=Message)
Opened = TypeVar("Opened")

REPORT_EVERY_S = 1.0
ASK_EVERY_S = 1.0
# A worker's event loop answers within milliseconds however busy its device is; a stopped process does not.
ANSWER_S = 2.0
# A worker whose state has gone is asked after this time: it may only have written late, or Redis was emptied.
DOUBT_S = 1.0
# Many workers that must be asked at once are asked this far apart.
ASK_APART_S = 0.002


class Worker(Generic[Info]):
    """One worker, as this process sees it.

    target: HOST:PORT. info: its last answer or state; None while it is lost. load: its streams. on_silence: callbacks
    of this process's streams there, called when the worker stops answering. is_listed: the pool's names resolve to its
    address. chain: name of its chain; a chain's streams are counted at one of its workers.
    is_lost: a stream, a call or a question has found it lost, and it has not answered since. on_lost: called then.
    is_asked: it is being asked directly. ask_now: set to ask it at once. was_asked: set after its answer or failure.
    """

    def __init__(self, target: str, credentials: grpc.ChannelCredentials | None = None, *, name: str = "") -> None:
        self.target = target
        self.info: Info | None = None
        self.load = WorkerLoad()
        self.on_silence: set[Callable[[], None]] = set()
        self.on_lost: Callable[[], None] = lambda: None
        self.is_listed = True
        self.is_lost = self.is_asked = False
        self.ask_now, self.was_asked = asyncio.Event(), asyncio.Event()
        self.chain = ""
        self._credentials, self._name = credentials, name

    @cached_property
    def channel(self) -> grpc.aio.Channel:
        """The channel to the worker, which connects when it is first used."""
        return channel(self.target, self._credentials, name=self._name)

    def update(self, info: Info, *, is_registered: bool = False) -> None:
        """Take over an answer, or a state of the registry."""
        self.info, self.chain, self.is_lost = info, getattr(info, "chain", ""), False
        self.load.is_registered, self.load.is_doubtful = is_registered, False
        self.load.num_levels = len(getattr(info, "levels", ())) or 1
        self.load.report(getattr(info, "active", 0), getattr(info, "capacity", 0), getattr(info, "max_streams", 0))

    def mark_lost(self) -> None:
        """Open no stream at the worker until it answers a question."""
        is_new, self.is_lost = not self.is_lost, True
        self.info, self.load.is_registered = None, False
        if is_new:
            self.on_lost()

    def mark_silent(self) -> None:
        """Mark a worker that is reachable but does not answer as lost, and notify its streams."""
        self.mark_lost()
        for notify in [*self.on_silence]:
            notify()

    async def aclose(self) -> None:
        """Close the channel, if it was used."""
        if "channel" in vars(self):
            await self.channel.close()


class WorkerPool(Generic[Info]):
    """All workers of a stage.

    stage: name that errors carry, and field of WorkerState. targets: HOST:PORT or NAME:PORT of each. get_info: asks the
    worker at the end of a channel what it serves. discovery: the registry's reader; without it all are asked directly.
    credentials: for TLS; a certificate is for the target's name, at each of its addresses.
    version: changes when a worker's description may have changed.
    """

    def __init__(
        self,
        stage: str,
        targets: Sequence[str],
        get_info: Callable[[grpc.aio.Channel], Awaitable[Info]],
        credentials: grpc.ChannelCredentials | None = None,
        discovery: Discovery | None = None,
    ) -> None:
        self.stage = stage
        self.version = 0
        self._targets = targets
        self._get_info = get_info
        self._credentials = credentials
        self._discovery = discovery
        self._addresses = Addresses(targets, self._update_workers)
        self._workers: dict[str, Worker[Info]] = {}
        self._states: Mapping[str, Info] = {}
        self._rng = random.Random()
        self._tasks = asyncio.TaskGroup()
        self._running: set[asyncio.Task[None]] = set()
        telemetry.STREAMS_REBUILT.add(0, {"stage": stage})

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """Follow the workers while the body runs. Enter it before `Discovery.running`."""
        if self._discovery:
            self._discovery.follow(self.stage, self._take)
        await self._addresses.resolve()
        await self._tasks.__aenter__()
        try:
            for each in self._addresses.followers():
                self._start(each)
            self._start(self._report_forever())
            if not self._discovery:
                self._take({})
            yield
        finally:
            for task in self._running:
                task.cancel()
            await self._tasks.__aexit__(None, None, None)
            for worker in self._workers.values():
                await worker.aclose()

    async def workers(self, serves: Callable[[Info], bool] = lambda _: True) -> list[tuple[Worker[Info], Info]]:
        """Return the workers that answer and serve what is asked, in the order of placement. StageLost if none does."""
        found = await self._found(serves)
        return sorted(found, key=lambda each: each[0].load.rank(is_live=True))

    async def open(
        self,
        open_at: Callable[[Worker[Info], int | None], Awaitable[Opened]],
        serves: Callable[[Info], bool] = lambda _: True,
        *,
        first: str = "",
        is_live: bool = True,
    ) -> tuple[Worker[Info], Opened]:
        """Open a stream at a worker that takes it. The caller takes it off `load.num_own` when it ends.

        open_at: opens it under a bound on the worker's other streams. first: HOST:PORT of a worker to try before all
        others, without a bound. is_live: kind of the stream. If no worker takes it, raises the error of one: NoCapacity
        if any of them is full.
        """
        await self._found(serves)
        refusal: AvatarError | None = None
        tries = Tries(
            lambda: [worker for worker, _ in self.answering(serves)],
            self._rng,
            is_live=is_live,
            first=self._workers.get(first),
        )
        while True:
            if tries.needs_news and self._discovery:
                await self._discovery.refresh(settled=True)
            if (chosen := tries.next()) is None:
                break
            worker, bound = chosen
            is_open = False
            try:
                opened = await open_at(worker, bound)
                is_open = True
                return worker, opened
            except NoCapacity as error:
                refusal, numbers = error, _numbers(error)
            except (StageLost, StageFailed, StoreUnavailable) as error:
                worker.mark_lost()  # until it answers again: others are tried first
                refusal, numbers = refusal or error, None
            finally:
                worker.load.num_own -= not is_open
            if worker.is_lost:
                tries.failed(worker)
            else:
                tries.refused(worker, numbers)
        if isinstance(refusal, NoCapacity):
            refusal.retry_s = retry_s(self._rng)
        raise refusal or self._lost("its workers are gone")

    async def call(self, call_at: Callable[[Worker[Info]], Awaitable[Opened]]) -> Opened:
        """Return the answer of a worker that gives one. Raises as `open` does."""
        worker, answer = await self.open(lambda worker, _: call_at(worker), is_live=False)
        worker.load.num_own -= 1
        return answer

    def room(self, serves: Callable[[Info], bool] = lambda _: True, *, is_live: bool) -> float:
        """Return the free slots of the workers that serve a stream, in sessions."""
        rooms = ((worker, worker.load.room(is_live=is_live)) for worker in self._workers.values() if worker.is_listed)
        return sum(room for worker, room in rooms if room and worker.info is not None and serves(worker.info))

    def is_full(self, serves: Callable[[Info], bool] = lambda _: True, *, is_live: bool) -> bool:
        """Return whether workers serve a stream, and all of them are known to be full."""
        accepting: list[Info] = []
        full: list[Info] = []
        for worker in self._workers.values():
            if worker.is_listed and worker.info is not None:
                (accepting if worker.load.may_accept(is_live=is_live) else full).append(worker.info)
        return not any(serves(info) for info in accepting) and any(serves(info) for info in full)

    async def refresh(self) -> None:
        """Wait for a fresh read of the registry, and for the answers of unknown and lost workers that are asked."""
        if self._discovery:
            await self._discovery.refresh()
        for worker in [*self._workers.values()]:
            if worker.is_asked and worker.info is None:
                await worker.was_asked.wait()

    def answering(self, serves: Callable[[Info], bool]) -> list[tuple[Worker[Info], Info]]:
        """Return the workers that are not lost and serve what is asked."""
        return [
            (worker, worker.info)
            for worker in self._workers.values()
            if worker.is_listed and worker.info is not None and serves(worker.info)
        ]

    async def _found(self, serves: Callable[[Info], bool]) -> list[tuple[Worker[Info], Info]]:
        """Return what `answering` returns, after a refresh if that is nothing. StageLost if it still is."""
        if found := self.answering(serves):
            return found
        await self.refresh()
        if found := self.answering(serves):
            return found
        raise self._lost(f"no worker answers at {', '.join(self._targets)}")

    def _lost(self, why: str) -> StageLost:
        return StageLost(f"{self.stage}: {why}", metadata={"stage": self.stage}, retry_s=retry_s(self._rng))

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._tasks.create_task(coroutine)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def _take(self, states: Mapping[str, Info]) -> None:
        """Take over what the registry has of the workers, and ask those that it has nothing of."""
        self._states = states
        self.version += 1
        num_asked = 0
        for worker in self._workers.values():
            if worker.is_lost:
                continue  # its state may be older than its loss
            if (info := states.get(worker.target)) is not None:
                worker.update(info, is_registered=True)
                continue
            if worker.load.is_registered:
                worker.load.is_registered, worker.load.is_doubtful = False, True
            if not worker.is_asked:
                delay_s = 0.0 if worker.info is None else DOUBT_S
                self._ask(worker, delay_s + ASK_APART_S * num_asked)
                num_asked += 1

    def _ask(self, worker: Worker[Info], delay_s: float = 0.0) -> None:
        """Ask a worker directly until it is registered."""
        self.version += 1
        worker.was_asked.clear()
        worker.ask_now.set()
        if not worker.is_asked:
            worker.is_asked = True
            self._start(self._ask_until_registered(worker, delay_s))

    async def _ask_until_registered(self, worker: Worker[Info], delay_s: float) -> None:
        try:
            worker.ask_now.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await worker.ask_now.wait()
            while worker is self._workers.get(worker.target) and (worker.is_lost or not worker.load.is_registered):
                await self._ask_once(worker)
                self.version += 1
                worker.ask_now.clear()
                worker.was_asked.set()
                with suppress(TimeoutError):
                    async with asyncio.timeout(ASK_EVERY_S):
                        await worker.ask_now.wait()
        finally:  # also if the worker has gone, and its channel was closed during the question
            worker.is_asked = False
            worker.was_asked.set()

    async def _ask_once(self, worker: Worker[Info]) -> None:
        try:
            worker.update(await self._get_info(worker.channel))
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                worker.mark_silent()
            else:  # gone, which its streams notice by themselves, or draining, which lets its streams end
                worker.mark_lost()

    def _update_workers(self) -> None:
        """Add workers at new addresses. Those whose addresses are gone are closed once they have no streams."""
        found = {address: name for each in self._addresses.by_target.values() for address, name in each.items()}
        for worker in self._workers.values():
            worker.is_listed = worker.target in found
        for address in found.keys() - self._workers.keys():
            worker = Worker(address, self._credentials, name=found[address])
            worker.on_lost = partial(self._ask, worker)
            self._workers[address] = worker
            if (info := self._states.get(address)) is not None:
                worker.update(info, is_registered=True)
            elif self._running:
                self._ask(worker)
        self.version += 1

    async def _report_forever(self) -> None:
        """Record the number of answering workers, and close those that are not listed and have no streams left."""
        while True:
            await asyncio.sleep(REPORT_EVERY_S)
            for target, addresses in self._addresses.by_target.items():
                num_workers = sum(self._workers[address].info is not None for address in addresses)
                telemetry.WORKERS.set(num_workers, {"target": target})
            busy_chains = {each.chain for each in self._workers.values() if each.load.num_own and each.chain}
            for address, worker in [*self._workers.items()]:
                if not (worker.is_listed or worker.load.num_own or worker.chain in busy_chains):
                    await self._workers.pop(address).aclose()


def _numbers(refusal: NoCapacity) -> tuple[int, int] | None:
    """Return a worker's active streams and capacity, and take them out of its refusal; None if it gives none."""
    active, capacity = refusal.metadata.pop("active", ""), refusal.metadata.pop("capacity", "")
    return (int(active), int(capacity)) if active.isdecimal() and capacity.isdecimal() else None
