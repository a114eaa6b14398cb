"""What every service's server has in common: options, errors, the order of a stream, and its life.

A worker's stream is `open`, items, `close`; see `parts`. Exceptions become statuses in one place, `Statuses`.
"""

import asyncio
import logging
import signal
import time
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any, Protocol, TypeAlias, TypeVar

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from avatar import telemetry
from avatar.errors import DOMAIN, AvatarError, ConnectionLost, InvalidField, ProtocolOrder

logger = logging.getLogger(__name__)

# The largest message between workers is a reference's motion latents: 20 bytes a pixel in float32, 18 MB at 1280x704.
MAX_MESSAGE_BYTES = 64 << 20
# gRPC's own default, which a status with details needs too.
MAX_METADATA_BYTES = 8 << 10
OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Over the first a call may be refused, over the second it is.
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", 2 * MAX_METADATA_BYTES),
    # A frozen peer is noticed after keepalive time + ping time-out; without the second it would take a minute.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.ping_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
]
SERVER_OPTIONS = [
    *OPTIONS,
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    # Two servers on one port would share its connections at random; a worker's streams have state.
    ("grpc.so_reuseport", 0),
]

# A status travels in the trailers, twice; over 16 KB they are dropped. Its text may repeat what a client sent.
MAX_TEXT = 1000
# A peer that is given a stream and does not open it is let go after so many seconds.
OPEN_S = 30.0

Request = TypeVar("Request", bound=Message)
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class Servicer(Protocol):
    """What `serving` needs of a service."""

    service_name: str

    def add_to(self, server: grpc.aio.Server) -> None: ...


def status_of(error: AvatarError) -> status_pb2.Status:
    """The google.rpc.Status of an error: ErrorInfo always, BadRequest and RetryInfo where they apply."""
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata),
    ]
    if error.violations:
        violation = error_details_pb2.BadRequest.FieldViolation
        fields = [violation(field=field, description=text[:MAX_TEXT]) for field, text in error.violations]
        details.append(error_details_pb2.BadRequest(field_violations=fields))
    if error.retry_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(error.retry_s * 1000))
        details.append(retry)
    status = status_pb2.Status(code=code_pb2.Code.Value(error.code.name), message=error.message[:MAX_TEXT])
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return status


class Statuses(grpc.aio.ServerInterceptor):
    """Turns what a handler raises into a status, and makes sure that a handler's generator is closed with its call."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        try:
            handler = await continuation(handler_call_details)
        except AvatarError as error:  # of another interceptor
            handler = _refusing(error)
        if handler is None:
            return None
        method: str = handler_call_details.method
        if handler.unary_unary:

            async def unary(data: bytes, context: Any) -> Any:
                async def handling() -> Any:
                    return await handler.unary_unary(_parsed(handler, data), context)

                return await _as_status(method, context, handling())

            return grpc.unary_unary_rpc_method_handler(unary, None, handler.response_serializer)
        if handler.stream_stream:

            async def stream(messages: AsyncIterator[bytes], context: Any) -> None:
                async def handling() -> None:
                    async with aclosing(_all_parsed(handler, messages)) as requests:
                        await _write_all(handler.stream_stream(requests, context), context)

                await _as_status(method, context, handling())

            return grpc.stream_stream_rpc_method_handler(stream, None, handler.response_serializer)
        return handler


def _refusing(error: AvatarError) -> Any:
    """A handler that reads nothing and ends any kind of call with this error."""

    async def refuse(_: AsyncIterator[Any], __: Any) -> None:
        raise error

    return grpc.stream_stream_rpc_method_handler(refuse)


async def _write_all(answers: Any, context: Any) -> None:
    """Send what a handler answers, unless it writes by itself."""
    if not isinstance(answers, AsyncGenerator):
        await answers
        return
    # Left to itself, a generator would be closed when it is collected, and its session's state with it.
    async with aclosing(answers):
        async for answer in answers:
            await context.write(answer)


async def _as_status(method: str, context: Any, handling: Awaitable[Any]) -> Any:
    """What a handler returns; what it raises ends the call with a status."""
    started = time.perf_counter()
    code = "OK"
    try:
        return await handling
    except (grpc.aio.AbortError, asyncio.CancelledError):
        code = "CANCELLED"
        raise
    except Exception as error:
        status = _told(method, error)
        code = code_pb2.Code.Name(status.code)
    finally:
        telemetry.RPC_DURATION.record(
            time.perf_counter() - started,
            {"rpc.system.name": "grpc", "rpc.method": method, "rpc.response.status_code": code},
        )
    # Only now that the error is gone: the server keeps its last abort, and with it what was being handled meanwhile.
    return await context.abort_with_status(rpc_status.to_status(status))


def _told(method: str, error: Exception) -> status_pb2.Status:
    """What the client is told of an error. One that is not meant for it is a defect of ours, and logged."""
    known = _cause(error)
    if not isinstance(known, AvatarError):
        # The text and not the exception: a kept traceback keeps the tensors of its frames.
        logger.error(
            "handler failed", extra={"method": method, "traceback": "".join(traceback.format_exception(known))}
        )
        known = AvatarError(f"{type(known).__name__}: {known}")
    return status_of(known)


def _parsed(handler: Any, data: bytes) -> Any:
    """A request from its bytes: here and not in gRPC, whose own error would carry no details."""
    try:
        return handler.request_deserializer(data)
    except DecodeError as error:
        raise InvalidField.at("request", "the bytes are not a message of this method") from error


async def _all_parsed(handler: Any, messages: AsyncIterator[bytes]) -> AsyncGenerator[Any, None]:
    async for data in messages:
        yield _parsed(handler, data)


def reason_of(error: BaseException) -> str:
    """The reason of an error, for logs and metrics."""
    known = _cause(error)
    if isinstance(known, asyncio.CancelledError):
        return ConnectionLost.reason
    return known.reason if isinstance(known, AvatarError) else AvatarError.reason


def _cause(error: BaseException) -> BaseException:
    """The first of what a task group collected: the others failed because it did."""
    while isinstance(error, BaseExceptionGroup):
        error = next((each for each in error.exceptions if isinstance(each, AvatarError)), error.exceptions[0])
    return error


async def opening(requests: AsyncIterator[Request]) -> Any:
    """The `open` message that every stream begins with. ProtocolOrder if it is late, or another one comes."""
    try:
        async with asyncio.timeout(OPEN_S):
            request: Any = await anext(aiter(requests), None)
    except TimeoutError as error:
        raise ProtocolOrder(f"the stream was not opened within {OPEN_S:g} s") from error
    if request is None:
        raise ConnectionLost("the stream ended before it was opened")
    part = request.WhichOneof("part")
    if part != "open":
        raise ProtocolOrder(f"the stream began with {part or 'an empty message'}, expected open")
    return request.open


async def parts(requests: AsyncIterator[Request], field: str) -> AsyncGenerator[Any, None]:
    """The items of an opened stream, until `close`.

    ProtocolOrder for any other message; ConnectionLost if the stream ends without close.
    """
    async for request in requests:
        part = request.WhichOneof("part")
        if part == "close":
            return
        if part != field:
            raise ProtocolOrder(f"{part or 'an empty message'} came on an open stream, expected {field} or close")
        yield getattr(request, field)
    raise ConnectionLost("the stream ended without close")


@contextmanager
def blaming(field: str, error: type[InvalidField] = InvalidField) -> Iterator[None]:
    """Say which field it was whose value a model could not use."""
    try:
        yield
    except ValueError as problem:
        raise error.at(field, str(problem)) from problem


@asynccontextmanager
async def serving(
    listen: str,
    *servicers: Servicer,
    drain_s: float = 0.0,
    credentials: grpc.ServerCredentials | None = None,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    max_message_bytes: int = MAX_MESSAGE_BYTES,
) -> AsyncGenerator[int, None]:
    """Serve while the body runs, with health and reflection; gives the port.

    listen: HOST:PORT, port 0 for a free one. drain_s: seconds that open streams are given at the end.
    credentials: for TLS; plain text without them. interceptors: what they raise becomes a status too.
    max_message_bytes: largest message that is taken. ValueError if the address is taken.
    """
    options = list({**dict(SERVER_OPTIONS), "grpc.max_receive_message_length": max_message_bytes}.items())
    server = grpc.aio.server(interceptors=[Statuses(), *interceptors], options=options)
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    names = [servicer.service_name for servicer in servicers]
    for servicer in servicers:
        servicer.add_to(server)
    reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    try:
        port = server.add_secure_port(listen, credentials) if credentials else server.add_insecure_port(listen)
    except RuntimeError as error:
        raise ValueError(f"cannot listen at {listen}: {error}") from error
    await server.start()
    for name in ["", *names]:
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    logger.info("serving", extra={"services": names, "port": port})
    try:
        yield port
    finally:
        await checks.enter_graceful_shutdown()
        await server.stop(drain_s)


async def until_stopped() -> None:
    """Wait for SIGTERM or SIGINT."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    await stopped.wait()
