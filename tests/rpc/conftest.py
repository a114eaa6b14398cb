"""A small real worker whose streams behave as a test tells them, and the items that it is sent."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from types import EllipsisType
from typing import TypeAlias

import grpc.aio
import pytest

from avatar.rpc.channel import channel
from avatar.rpc.interceptor import Context, parts, receive_open
from avatar.rpc.server import serving
from avatar.worker.v1 import audio_pb2 as pb
from avatar.worker.v1 import audio_pb2_grpc
from avatar.worker.v1.types_pb2 import Block, Closed

Requests: TypeAlias = AsyncIterator[pb.EncodeRequest]
Responses: TypeAlias = AsyncGenerator[pb.EncodeResponse, None]

OPEN = pb.EncodeRequest(open=pb.OpenEncode(session_id="a"))
CLOSE = pb.EncodeRequest(close=pb.CloseEncode())
OPENED = pb.EncodeResponse(opened=pb.EncodeOpened(history_s=0.5))
WAIT_S = 10.0


def piece(number: int) -> pb.AudioPiece:
    """Return audio that `numbered` answers with the block of this number."""
    return pb.AudioPiece(data=str(number).encode())


def block(number: int) -> pb.EncodeResponse:
    return pb.EncodeResponse(block=Block(index=number))


async def numbered(requests: Requests, _: Context) -> Responses:
    """A correct worker: each piece is answered with the block whose number it holds."""
    await receive_open(requests)
    yield OPENED
    num_blocks = 0
    async for each in parts(requests, "piece"):
        num_blocks += 1
        yield block(int(each.data))
    yield pb.EncodeResponse(closed=Closed(num_blocks=num_blocks, busy_s=0.25))


class Worker(audio_pb2_grpc.AudioServiceServicer):
    """An audio worker without a model.

    encode: handles a stream. info: handles GetInfo. target: HOST:PORT.
    """

    service_name = "avatar.worker.v1.AudioService"

    def __init__(self) -> None:
        self.encode: Callable[[Requests, Context], Responses] = numbered
        self.info: Callable[[], pb.AudioServiceGetInfoResponse] = pb.AudioServiceGetInfoResponse
        self.target = ""

    def add_to(self, server: grpc.aio.Server) -> None:
        audio_pb2_grpc.add_AudioServiceServicer_to_server(self, server)

    def Encode(self, requests: Requests, context: Context) -> Responses:  # noqa: N802
        return self.encode(requests, context)

    async def GetInfo(  # noqa: N802
        self, _: pb.AudioServiceGetInfoRequest, __: Context
    ) -> pb.AudioServiceGetInfoResponse:
        return self.info()


@dataclass
class Source:
    """A stream of pieces; `closed` is set when it is closed.

    end: an error to raise after the pieces, None to end, or ... to wait for ever.
    """

    numbers: Iterable[int]
    end: BaseException | EllipsisType | None = None
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    async def stream(self) -> AsyncGenerator[pb.AudioPiece, None]:
        try:
            for number in self.numbers:
                yield piece(number)
            if self.end is ...:
                await asyncio.Event().wait()
            elif self.end:
                raise self.end
        finally:
            self.closed.set()


async def encode(
    stub: "audio_pb2_grpc.AudioServiceAsyncStub", requests: Iterable[pb.EncodeRequest]
) -> list[pb.EncodeResponse]:
    """Return all answers of a stream.

    A test that expects a refusal sends nothing that the worker has not read by then: a client of grpc.aio may see that
    its write failed instead of the refusal.
    """
    return [response async for response in stub.Encode(iter(requests), timeout=WAIT_S)]


@pytest.fixture
async def worker() -> AsyncGenerator[Worker, None]:
    worker = Worker()
    async with serving("127.0.0.1:0", worker) as port:
        worker.target = f"127.0.0.1:{port}"
        yield worker


@pytest.fixture
async def connection(worker: Worker) -> AsyncGenerator[grpc.aio.Channel, None]:
    """A channel to the worker."""
    async with channel(worker.target) as connection:
        yield connection


@pytest.fixture
def stub(connection: grpc.aio.Channel) -> "audio_pb2_grpc.AudioServiceAsyncStub":
    return audio_pb2_grpc.AudioServiceStub(connection)
