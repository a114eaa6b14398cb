"""Calls at a server: their requests in order, and the exceptions of their handlers as gRPC statuses.

A worker's stream is `open`, items, `close`: a handler reads it with `receive_open` and then `parts`. It is a generator
of answers, single ones or lists of those that are ready together; or it writes them by itself. Blocks come and go as
`RelayedBlock`, in place of the message that holds them.
"""

import asyncio
import logging
import time
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from functools import cache, partial
from typing import Any, TypeAlias, TypeVar

import grpc
import grpc.aio
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import code_pb2, status_pb2
from grpc_status import rpc_status

from avatar import telemetry
from avatar.errors import REASONS, AvatarError, ConnectionLost, InvalidField, NoCapacity, ProtocolOrder
from avatar.rpc.status import reason_of, root_cause, status_of
from avatar.rpc.wire import RelayedBlock, block_field, parse_part, serialize_part

logger = logging.getLogger(__name__)

# A peer that starts a stream and sends no `open` message is disconnected after so many seconds.
OPEN_S = 30.0

Request = TypeVar("Request", bound=Message)
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class StatusInterceptor(grpc.aio.ServerInterceptor):
    """Turn a handler's exception into a status, and close a handler's generator when its call ends."""

    def __init__(self) -> None:
        for reason in REASONS:
            telemetry.CALLS_FAILED.add(0, {"reason": reason})

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        try:
            handler = await continuation(handler_call_details)
        except AvatarError as error:  # raised by another interceptor
            handler = _refusing(error)
        if handler is None:
            return None
        method: str = handler_call_details.method
        if handler.unary_unary:

            async def unary(data: bytes, context: Any) -> Any:
                with _outcome(method) as outcome:
                    return await handler.unary_unary(_parse(handler.request_deserializer, data), context)
                return await outcome.abort(context)  # the handler raised

            return grpc.unary_unary_rpc_method_handler(unary, None, handler.response_serializer)
        if handler.stream_stream:

            async def stream(requests: AsyncIterator[Any], context: Any) -> None:
                with _outcome(method) as outcome:
                    answers = handler.stream_stream(requests, context)
                    if isinstance(answers, AsyncGenerator):
                        # gRPC leaves a generator open until it is collected, and with it its session's state.
                        async with aclosing(answers):
                            async for answer in answers:
                                for message in answer if isinstance(answer, list) else [answer]:
                                    await context.write(message)
                    else:  # the handler writes by itself
                        await answers
                answers = answer = message = None  # see `abort`: this frame is kept, too
                if outcome.status:
                    await outcome.abort(context)

            return grpc.stream_stream_rpc_method_handler(stream, _parser(method, handler), _serializer(method, handler))
        return handler


def _parser(method: str, handler: Any) -> Callable[[bytes], Any]:
    """Return the parser of a streaming method's requests, which leaves the tensors of blocks serialized."""
    described = _described(method)
    if described is None or (block := block_field(described.input_type)) is None:
        return partial(_parse, handler.request_deserializer)
    return partial(_parse, partial(parse_part, message=GetMessageClass(described.input_type), block=block))


def _serializer(method: str, handler: Any) -> Callable[[Any], bytes]:
    """Return the serializer of a streaming method's answers, which may be blocks in place of their messages."""
    described = _described(method)
    block = block_field(described.output_type) if described else None
    serializer: Callable[[Any], bytes] = handler.response_serializer
    return partial(serialize_part, block=block) if block else serializer


@cache
def _described(method: str) -> MethodDescriptor | None:
    """Return the descriptor of a method, `/package.Service/Method`; None if it has none."""
    try:
        return descriptor_pool.Default().FindMethodByName(method.strip("/").replace("/", "."))
    except KeyError:
        return None


def _refusing(error: AvatarError) -> Any:
    """Return a handler that reads nothing and ends any kind of call with this error."""

    async def refuse(_: AsyncIterator[Any], __: Any) -> None:
        raise error

    return grpc.stream_stream_rpc_method_handler(refuse)


class _Outcome:
    """The outcome of a call. status: the error's status if its handler raised."""

    status: status_pb2.Status | None = None

    async def abort(self, context: Any) -> None:
        """End the call with the status. Must not be called in an `except` block: the server keeps its last AbortError,
        and with it any error that is being handled.
        """
        await context.abort_with_status(rpc_status.to_status(self.status))


@contextmanager
def _outcome(method: str) -> Iterator[_Outcome]:
    """Record the duration of a call, and put the status of an error into the outcome instead of raising the error."""
    started = time.perf_counter()
    code, outcome = "OK", _Outcome()
    try:
        yield outcome
    except (grpc.aio.AbortError, asyncio.CancelledError):
        code = "CANCELLED"
        raise
    except Exception as error:
        if _is_out_of_memory(error):
            # Another worker may have the memory. As a defect, the stream would be rebuilt into the same lack.
            logger.warning("out of memory", extra={"method": method, "problem": str(root_cause(error)).split("\n")[0]})
            error = NoCapacity("this worker's device has no memory left", retry_s=1.0)
        outcome.status = _status(method, error)
        telemetry.CALLS_FAILED.add(1, {"reason": reason_of(error)})
        code = code_pb2.Code.Name(outcome.status.code)
    finally:
        telemetry.RPC_DURATION.record(
            time.perf_counter() - started,
            {"rpc.system.name": "grpc", "rpc.method": method, "rpc.response.status_code": code},
        )


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether memory could not be allocated. torch's error is compared by name: gateways are without torch."""
    cause = root_cause(error)
    return isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError"


def _status(method: str, error: Exception) -> status_pb2.Status:
    """Return the status of an error. Any error but an AvatarError is a defect of ours, and is logged."""
    cause = root_cause(error)
    if not isinstance(cause, AvatarError):
        # Log text, not the exception: a kept traceback keeps the tensors of its frames.
        text = telemetry.without_session_ids("".join(traceback.format_exception(cause)))
        logger.error("handler failed", extra={"method": method, "traceback": text})
        cause = AvatarError(telemetry.without_session_ids(f"{type(cause).__name__}: {cause}"))
    return status_of(cause)


def _parse(parse: Callable[[bytes], Any], data: bytes) -> Any:
    """Parse a request. InvalidField if it cannot be parsed; gRPC's own parsing would give an error without details."""
    try:
        return parse(data)
    except DecodeError as error:
        raise InvalidField.at("request", "the bytes are not a message of this method") from error


async def receive_open(requests: AsyncIterator[Request]) -> Any:
    """Return the `open` message of a stream. ProtocolOrder if another message comes first, or none within OPEN_S."""
    try:
        async with asyncio.timeout(OPEN_S):
            request: Any = await anext(aiter(requests), None)
    except TimeoutError as error:
        raise ProtocolOrder(f"the stream was not opened within {OPEN_S:g} s") from error
    if request is None:
        raise ConnectionLost("the stream ended before it was opened")
    part = _part(request)
    if part != "open":
        raise ProtocolOrder(f"the stream began with {part or 'an empty message'}, expected open")
    return request.open


def max_active(opened: Any) -> int | None:
    """Return the field of this name of an `open` message, None if it is not set."""
    return opened.max_active if opened.HasField("max_active") else None


def _part(request: Any) -> str | None:
    """Return the name of the part that a request holds."""
    part: str | None = "block" if isinstance(request, RelayedBlock) else request.WhichOneof("part")
    return part


async def parts(requests: AsyncIterator[Request], *fields: str) -> AsyncGenerator[Any, None]:
    """Yield the items of an opened stream until `close`; blocks as `RelayedBlock`.

    fields: of the items. ProtocolOrder for any other message; ConnectionLost if the stream ends without close.
    """
    async for request in requests:
        part = _part(request)
        if part == "close":
            return
        if part not in fields:
            expected = " or ".join([*fields, "close"])
            raise ProtocolOrder(f"{part or 'an empty message'} came on an open stream, expected {expected}")
        yield request if isinstance(request, RelayedBlock) else getattr(request, part)
    raise ConnectionLost("the stream ended without close")


@contextmanager
def as_invalid_field(field: str, error: type[InvalidField] = InvalidField) -> Iterator[None]:
    """Turn a ValueError of the body into an error that names the field whose value a model could not use."""
    try:
        yield
    except ValueError as problem:
        raise error.at(field, str(problem)) from problem
