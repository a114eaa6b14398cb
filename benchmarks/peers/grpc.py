"""Bare grpc.aio: the suite's processes, messages and sizes without anything else, and so the floor of its hops.

    client -> relay -> audio -> relay -> level 0 -> relay ... -> decoder -> relay -> client

The relay keeps the features and joins them with each latent. Messages are bytes, features first, without protobuf;
steps block the event loop, so no thread hands over to another. No sessions, no store, no deadlines, no recovery.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from typing import Any

import grpc.aio
import numpy as np

from avatar.rpc.channel import OPTIONS, channel
from benchmarks.peers.work import AUDIO_STEP_S, DECODER, Job, Microphone, Peer, Report, audio_of, processes
from benchmarks.standin import content
from benchmarks.standin.step import Step
from services.local.processes import free_ports

SERVICE, METHOD = "bench.Stage", "Stream"
Handler = Callable[[AsyncIterator[bytes], Any], Any]


class Client:
    """The client of the relay."""

    def __init__(self, port: int) -> None:
        self._port = port

    def work(self, job: Job) -> Report:
        return asyncio.run(self._work(job))

    async def _work(self, job: Job) -> Report:
        report = Report()
        in_flight = asyncio.Semaphore(1 if job.pace == "alone" else DECODER + 3)
        async with channel(f"127.0.0.1:{self._port}") as connection:
            call = await _stream(connection)
            microphone = Microphone(job, report)

            async def speak() -> None:
                for block in range(job.num_blocks):
                    await in_flight.acquire()
                    await call.write(microphone.read(block))

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(speak())
                for block in range(job.num_blocks):
                    report.add(audio_of(block), await call.read())
                    in_flight.release()
            call.cancel()
        return report


async def _relay(ports: list[int], requests: AsyncIterator[bytes], context: Any) -> None:
    """Pass one client's blocks through the stages at these ports: audio, levels, decoder."""
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
        connections = [await stack.enter_async_context(channel(f"127.0.0.1:{port}")) for port in ports]
        audio, *levels, decoder = [await _stream(each) for each in connections]
        features: list[deque[bytes]] = [deque() for _ in levels]

        async def encode() -> None:
            async for request in requests:
                await audio.write(request)

        async def start() -> None:
            while True:
                block = await audio.read()
                for each in features:
                    each.append(block)
                await levels[0].write(features[0].popleft())

        async def denoise(level: int) -> None:
            while True:
                latent = await levels[level].read()
                await levels[level + 1].write(b"".join((features[level + 1].popleft(), latent)))

        async def finish() -> None:
            while True:
                await decoder.write(await levels[-1].read())

        async def answer() -> None:
            while True:
                await context.write(await decoder.read())

        for each in (start(), *map(denoise, range(len(levels) - 1)), finish(), answer()):
            tasks.create_task(each)
        await encode()


async def _compute(stage: int, step_s: float, requests: AsyncIterator[bytes], context: Any) -> None:
    """Run a stage of one stream: audio is -1, then levels, then the decoder."""
    device = Step(AUDIO_STEP_S if stage < 0 else step_s)
    split = content.PUBLIC.features_bytes
    async for request in requests:
        if stage < 0:
            answer = device.run(partial(content.PUBLIC.features_of, request))
        elif stage == DECODER:
            answer = device.run(partial(content.decode, np.frombuffer(request, np.uint8)))
        else:
            start = np.frombuffer(request, np.uint8, offset=split) if stage else content.PUBLIC.initial_latent(request)
            answer = device.run(partial(content.denoise, start, stage)).tobytes()
        await context.write(answer)


async def _stream(connection: grpc.aio.Channel) -> Any:
    open_call: Any = connection.stream_stream(f"/{SERVICE}/{METHOD}")
    return open_call(wait_for_ready=True)


def serve(port: int, handler: Handler) -> None:
    """Serve a stage or the relay, until the process is killed."""
    asyncio.run(_serve(port, handler))


async def _serve(port: int, handler: Handler) -> None:
    server = grpc.aio.server(options=OPTIONS)
    methods: dict[str, Any] = {METHOD: grpc.stream_stream_rpc_method_handler(handler)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, methods)])
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


@contextmanager
def peer(step_s: float) -> Iterator[tuple[Peer, list[int]]]:
    """Give the peer and the ids of its other processes."""
    entry, *ports = free_ports(DECODER + 3)
    stages = [(port, partial(_compute, number - 1, step_s)) for number, port in enumerate(ports)]
    with processes(serve, [(entry, partial(_relay, ports)), *stages]) as pids:
        yield Client(entry), pids
