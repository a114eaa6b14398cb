"""A ring of processes over ZeroMQ that pushes features and latents on, and does nothing else.

    source -> level 0 -> 1 -> 2 -> 3 -> decoder -> sink (the source's process)

No sessions, no answers, no ordering, no recovery: the cost of moving the bytes, and so the lower bound.
"""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import zmq

from benchmarks.peers.work import AUDIO_STEP_S, DECODER, Job, Microphone, Peer, Report, audio_of, processes
from benchmarks.standin import content
from benchmarks.standin.step import Step

# Messages queued at each end of a connection.
QUEUED = 1


class Ring:
    """The source and the sink."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", first: str, last: str) -> None:
        self._source, self._sink = _sockets(context, last, first)
        self._audio = Step(AUDIO_STEP_S)

    def work(self, job: Job) -> Report:
        report = Report()
        microphone = Microphone(job, report)
        in_flight = threading.Semaphore(1 if job.pace == "alone" else DECODER + 3)

        def speak() -> None:
            for block in range(job.num_blocks):
                in_flight.acquire()
                audio = microphone.read(block)
                features = self._audio.run(partial(content.PUBLIC.features_of, audio))
                self._source.send_multipart([features, b""], copy=False)

        speaking = threading.Thread(target=speak)
        speaking.start()
        for block in range(job.num_blocks):
            _, picture = self._sink.recv_multipart()
            report.add(audio_of(block), picture)
            in_flight.release()
        speaking.join()
        return report


def serve(stage: int, here: str, there: str, step_s: float) -> None:
    """Run a stage: a level, or the decoder."""
    source, sink = _sockets(zmq.Context(), here, there)
    device = Step(step_s)
    while True:
        features, data = sink.recv_multipart(copy=False)
        if stage == DECODER:
            latent = np.frombuffer(data.buffer, np.uint8)
            message: list[Any] = [b"", device.run(partial(content.decode, latent))]
        else:
            start = np.frombuffer(data.buffer, np.uint8) if stage else content.PUBLIC.initial_latent(features.buffer)
            denoised = device.run(partial(content.denoise, start, stage))
            message = [features.buffer if stage < DECODER - 1 else b"", denoised.data]
        source.send_multipart(message, copy=False)


def _sockets(
    context: "zmq.Context[zmq.Socket[bytes]]", here: str, there: str
) -> "tuple[zmq.Socket[bytes], zmq.Socket[bytes]]":
    """Return the socket that sends to the next stage, and the one that receives from the previous."""
    source, sink = context.socket(zmq.PUSH), context.socket(zmq.PULL)
    source.sndhwm = sink.rcvhwm = QUEUED
    source.linger = 0
    sink.bind(here)
    source.connect(there)
    return source, sink


def _addresses(count: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [f"tcp://127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    finally:
        for each in sockets:
            each.close()


@contextmanager
def peer(step_s: float) -> Iterator[tuple[Peer, list[int]]]:
    """Give the peer and the ids of its other processes."""
    at = _addresses(DECODER + 2)
    stages = [(stage, at[stage], at[stage + 1], step_s) for stage in range(DECODER + 1)]
    with processes(serve, stages) as pids, zmq.Context() as context:
        ring = Ring(context, at[0], at[-1])
        yield ring, pids
        context.destroy(linger=0)
