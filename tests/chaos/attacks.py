"""Attacks: what a hostile client does to a gateway. Sessions of others must not notice.

An attack is a coroutine that takes the gateway's HOST:PORT and goes on until it is cancelled.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import cache
from itertools import cycle
from typing import Any, TypeAlias

import grpc.aio

from avatar.aio import background
from avatar.v1 import avatar_service_pb2 as pb
from tests.conftest import ASSETS
from tests.product import END_TURN, INTERRUPT, Call, Stub, connected, new_reference, new_session, open_stream
from tests.vae.picture.files import progressive_jpeg, webp_header, with_empty_segments

Attack: TypeAlias = Callable[[str], Coroutine[Any, Any, None]]
EMPTY = pb.StreamAvatarRequest(audio=pb.AudioPiece())
SAMPLE = pb.StreamAvatarRequest(audio=pb.AudioPiece(data=b"\1\0"))
FLOODS = [[EMPTY], [INTERRUPT], [END_TURN], [SAMPLE], [SAMPLE, END_TURN], [SAMPLE, INTERRUPT]]
# Of a picture that is invalid, and of one that comes while others are prepared.
REFUSALS = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)
FLOOD_MESSAGES, NUM_SILENT = 2000, 4
# Bytes that `send_halves` sends before it falls silent: nothing, HTTP/1, HTTP/2's preface, a frame's header.
HALVES = (
    b"",
    b"POST / HTTP/1.1\r\nHost: ",
    b"PRI * HTTP/2.0\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0\0\x40\0\1\5",
)
NUM_HALVES = 200


async def flood(target: str) -> None:
    """Send messages that carry little or nothing as fast as the gateway takes them, one kind after another."""
    async with connected(target) as stub:
        for messages in cycle(FLOODS):
            with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                async with hostile_stream(stub) as call, background(_read(call)):
                    for index in range(FLOOD_MESSAGES):
                        await call.write(messages[index % len(messages)])
            await asyncio.sleep(0.1)  # after a refusal, too


async def be_silent(target: str) -> None:
    """Keep streams open and send nothing on them."""
    async with connected(target) as stub:
        while True:
            with suppress(grpc.aio.AioRpcError):
                async with AsyncExitStack() as stack:
                    calls = [await stack.enter_async_context(hostile_stream(stub)) for _ in range(NUM_SILENT)]
                    await asyncio.gather(*map(_read, calls))
            await asyncio.sleep(0.1)


async def send_halves(target: str) -> None:
    """Open many connections, send the start of a request on each, and open those again that are closed."""
    host, _, port = target.rpartition(":")

    async def send(half: bytes) -> None:
        while True:
            with suppress(OSError):
                reader, writer = await asyncio.open_connection(host, int(port))
                try:
                    writer.write(half)
                    await reader.read(-1)
                finally:
                    writer.transport.abort()
            await asyncio.sleep(0.1)

    await asyncio.gather(*(send(HALVES[number % len(HALVES)]) for number in range(NUM_HALVES)))


async def send_bombs(target: str) -> None:
    """Send pictures that cost much, one after another. Fails if one is taken."""
    pictures = await asyncio.to_thread(bombs)  # the proxies run on this event loop
    async with connected(target) as stub:
        for picture in cycle(pictures):
            try:
                await new_reference(stub, picture)
            except grpc.aio.AioRpcError as error:
                assert error.code() in REFUSALS, error  # noqa: PT017  # any other error fails the attack
            else:
                raise AssertionError(f"a hostile picture of {len(picture)} bytes was taken")
            await asyncio.sleep(0.1)


@cache
def bombs() -> list[bytes]:
    """Return small pictures that unpack to much, and one that takes all of the time of its decoder."""
    return [
        progressive_jpeg(8192, 8192, 2500),
        progressive_jpeg(4096, 4096, 10_000),
        webp_header(16_383, 16_383),
        with_empty_segments(1_900_000),
    ]


@asynccontextmanager
async def hostile_stream(stub: Stub) -> AsyncGenerator[Call, None]:
    """Open an offline stream while the body runs; then delete its session."""
    session = await new_session(stub, (ASSETS / "portrait.png").read_bytes())
    try:
        call, _ = await open_stream(stub, session.id)
        yield call
    finally:
        await stub.DeleteSession(pb.DeleteSessionRequest(session_id=session.id), timeout=10)


async def _read(call: Call) -> None:
    async for _ in call:
        pass


ATTACKS: dict[str, Attack] = {
    "flood": flood,
    "be silent at": be_silent,
    "send halves to": send_halves,
    "send bombs to": send_bombs,
}
