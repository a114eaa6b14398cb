"""The server interceptor that turns exceptions of handlers into gRPC statuses."""

import asyncio
import logging
import time
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, status_pb2
from grpc_status import rpc_status

from avatar import telemetry
from avatar.errors import AvatarError, InvalidField
from avatar.rpc.status import root_cause, status_of

logger = logging.getLogger(__name__)


class StatusInterceptor(grpc.aio.ServerInterceptor):
    """Turn a handler's exception into a status, and close a handler's generator when its call ends."""

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
                async def handling() -> Any:
                    return await handler.unary_unary(_parse(handler, data), context)

                return await _with_status(method, context, handling())

            return grpc.unary_unary_rpc_method_handler(unary, None, handler.response_serializer)
        if handler.stream_stream:

            async def stream(messages: AsyncIterator[bytes], context: Any) -> None:
                async def handling() -> None:
                    async with aclosing(_parse_all(handler, messages)) as requests:
                        await _write_all(handler.stream_stream(requests, context), context)

                await _with_status(method, context, handling())

            return grpc.stream_stream_rpc_method_handler(stream, None, handler.response_serializer)
        return handler


def _refusing(error: AvatarError) -> Any:
    """Return a handler that reads nothing and ends any kind of call with this error."""

    async def refuse(_: AsyncIterator[Any], __: Any) -> None:
        raise error

    return grpc.stream_stream_rpc_method_handler(refuse)


async def _write_all(answers: Any, context: Any) -> None:
    """Write the answers of a handler that is a generator; await one that writes by itself."""
    if not isinstance(answers, AsyncGenerator):
        await answers
        return
    # gRPC leaves a generator open until it is collected, and with it the state of its session.
    async with aclosing(answers):
        async for answer in answers:
            await context.write(answer)


async def _with_status(method: str, context: Any, handling: Awaitable[Any]) -> Any:
    """Return a handler's result; end the call with a status if it raises. Record the call's duration."""
    started = time.perf_counter()
    code = "OK"
    try:
        return await handling
    except (grpc.aio.AbortError, asyncio.CancelledError):
        code = "CANCELLED"
        raise
    except Exception as error:
        status = _status(method, error)
        code = code_pb2.Code.Name(status.code)
    finally:
        telemetry.RPC_DURATION.record(
            time.perf_counter() - started,
            {"rpc.system.name": "grpc", "rpc.method": method, "rpc.response.status_code": code},
        )
    # Abort outside of the except block: the server keeps its last AbortError, and with it any error being handled.
    return await context.abort_with_status(rpc_status.to_status(status))


def _status(method: str, error: Exception) -> status_pb2.Status:
    """Return the status of an error. Any error but an AvatarError is a defect of ours, and is logged."""
    cause = root_cause(error)
    if not isinstance(cause, AvatarError):
        # Log text, not the exception: a kept traceback keeps the tensors of its frames.
        logger.error(
            "handler failed", extra={"method": method, "traceback": "".join(traceback.format_exception(cause))}
        )
        cause = AvatarError(f"{type(cause).__name__}: {cause}")
    return status_of(cause)


def _parse(handler: Any, data: bytes) -> Any:
    """Parse a request. InvalidField if it cannot be parsed; gRPC's own parsing would give an error without details."""
    try:
        return handler.request_deserializer(data)
    except DecodeError as error:
        raise InvalidField.at("request", "the bytes are not a message of this method") from error


async def _parse_all(handler: Any, messages: AsyncIterator[bytes]) -> AsyncGenerator[Any, None]:
    async for data in messages:
        yield _parse(handler, data)
