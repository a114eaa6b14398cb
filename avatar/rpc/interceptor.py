"""The server interceptor that turns exceptions of handlers into gRPC statuses."""

import asyncio
import logging
import time
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
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
                with _outcome(method) as outcome:
                    return await handler.unary_unary(_parse(handler, data), context)
                return await outcome.abort(context)  # the handler raised

            return grpc.unary_unary_rpc_method_handler(unary, None, handler.response_serializer)
        if handler.stream_stream:

            async def stream(messages: AsyncIterator[bytes], context: Any) -> None:
                with _outcome(method) as outcome:
                    async with aclosing(_parse_all(handler, messages)) as requests:
                        answers = handler.stream_stream(requests, context)
                        if isinstance(answers, AsyncGenerator):
                            # gRPC leaves a generator open until it is collected, and with it its session's state.
                            async with aclosing(answers):
                                async for answer in answers:
                                    await context.write(answer)
                        else:  # the handler writes by itself
                            await answers
                answers = answer = None  # see `abort`: this frame is kept, too
                if outcome.status:
                    await outcome.abort(context)

            return grpc.stream_stream_rpc_method_handler(stream, None, handler.response_serializer)
        return handler


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
        outcome.status = _status(method, error)
        code = code_pb2.Code.Name(outcome.status.code)
    finally:
        telemetry.RPC_DURATION.record(
            time.perf_counter() - started,
            {"rpc.system.name": "grpc", "rpc.method": method, "rpc.response.status_code": code},
        )


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
