"""Errors to gRPC statuses and back: google.rpc.Status with ErrorInfo, BadRequest and RetryInfo as its details."""

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from avatar.errors import DOMAIN, REASONS, AvatarError, ConnectionLost, MessageTooLarge

ENDED_EARLY = "the stream ended before all was answered"
FAILED_WRITE = "Internal error from Core"  # what grpc.aio makes of a write on a call that the peer has ended
# The peer's status comes right behind its last message.
STATUS_S = 1.0
# A status travels in the trailers, twice; over 16 KB they are dropped. Its text may repeat what a client sent.
MAX_TEXT = 1000
# Initial metadata of a worker that begins to work on a client's input, which may end the worker.
INPUT_TAKEN = ("avatar-input", "taken")
# Codes that gRPC itself gives, without details, to a call whose connection fails.
LOST = (
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.OK,  # ended before it was answered
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNKNOWN,
)


def status_of(error: AvatarError) -> status_pb2.Status:
    """Return an error's google.rpc.Status: ErrorInfo always, BadRequest and RetryInfo where they apply."""
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


def reason_of(error: BaseException) -> str:
    """Return an error's reason, for logs and metrics; INTERNAL unless it is an AvatarError or a cancellation."""
    cause = root_cause(error)
    if isinstance(cause, asyncio.CancelledError):
        return ConnectionLost.reason
    return cause.reason if isinstance(cause, AvatarError) else AvatarError.reason


def root_cause(error: BaseException) -> BaseException:
    """Return the first error of a task group's: the others failed because it did. AvatarErrors come first."""
    while isinstance(error, BaseExceptionGroup):
        error = next((each for each in error.exceptions if isinstance(each, AvatarError)), error.exceptions[0])
    return error


@dataclass
class ErrorDetails:
    """Details of a status. The fields are those of AvatarError; the reason is empty if there is no ErrorInfo."""

    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    violations: tuple[tuple[str, str], ...] = ()
    retry_s: float | None = None


def error_details(error: grpc.aio.AioRpcError) -> ErrorDetails:
    """Return the details of a call's status. Details that cannot be parsed count as none.

    Not by `rpc_status.from_call`, which refuses details whose text a proxy has cut in the status itself.
    """
    trailing: Any = error.trailing_metadata() or ()
    packed = next((value for key, value in trailing if key == "grpc-status-details-bin"), b"")
    info, request, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    try:
        for detail in status_pb2.Status.FromString(packed).details:
            for message in (info, request, retry):
                detail.Unpack(message)  # does nothing unless the detail is of the message's type
    except DecodeError:
        return ErrorDetails()
    retry_s = retry.retry_delay.ToMilliseconds() / 1000 if retry.HasField("retry_delay") else None
    violations = tuple((each.field, each.description) for each in request.field_violations)
    return ErrorDetails(info.reason, dict(info.metadata), violations, retry_s)


def error_of(error: grpc.aio.AioRpcError) -> AvatarError:
    """Return the error that a gateway's status stands for; ConnectionLost if it comes from no gateway.

    An unknown reason, of a later version, gives an AvatarError that carries this reason.
    """
    details = error_details(error)
    text = error.details() or error.code().name
    if details.reason:
        kind = REASONS.get(details.reason, AvatarError)
    elif error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
        kind = MessageTooLarge
    else:
        kind = ConnectionLost if error.code() in LOST else AvatarError
    result = kind(text, metadata=details.metadata, violations=details.violations, retry_s=details.retry_s)
    if details.reason:
        result.reason = details.reason  # type: ignore[misc]  # of this one error, where the class has none
    return result


class CallStatus:
    """The status that the peer ended a call with; `ended` is None while the call runs.

    A write that fails because the call has ended makes grpc.aio replace the peer's status by INTERNAL (grpc issue
    36066; measured: half of the calls that are refused while they write). If the peer's status came first, the done
    callback has seen it. If the write failed first, as in 2 % of them, the peer's status follows once its messages are
    read. `async for` reads them, and `call.read()` does not: read by `async for` or `anext`, and leave a failed write
    to the reader.
    """

    def __init__(self, call: Any) -> None:
        self.ended: grpc.aio.AioRpcError | None = None
        self._has_ended = asyncio.Event()
        call.add_done_callback(self._record)  # called again if the peer's status follows a failed write

    async def instead_of(self, error: grpc.aio.AioRpcError) -> grpc.aio.AioRpcError:
        """Return the peer's own error for one that reading raised: it may come a moment after the last message."""
        if error.details() != FAILED_WRITE:
            return error
        with suppress(TimeoutError):
            async with asyncio.timeout(STATUS_S):
                await self._has_ended.wait()
        return self.ended or error

    def _record(self, call: Any) -> None:
        code, details, trailing = (_finished(each) for each in (call.code(), call.details(), call.trailing_metadata()))
        if details == FAILED_WRITE:
            return
        if code is grpc.StatusCode.OK:  # it is read only if more was to be written or read
            details = ENDED_EARLY
        self.ended = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details)
        self._has_ended.set()


def _finished(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Return the result of a coroutine that does not suspend."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("a call that is done has its status")
