"""How a call ended: the peer's own status, and what google.rpc's details in it say.

The details are read field by field with protobuf alone, so that the client needs no other package.
"""

from collections import defaultdict
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2, empty_pb2
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

from avatar.errors import REASONS, AvatarError, ConnectionLost, MessageTooLarge

ENDED_EARLY = "the stream ended before all was answered"
DETAILS = "grpc-status-details-bin"
# Codes of gRPC itself, which come without details: all that a connection can do.
LOST = (
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.OK,  # ended before it was answered
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNKNOWN,
)


class CallStatus:
    """How the peer ended a call; `ended` is None until it has.

    A write that fails because the call has ended makes grpc.aio replace the peer's status by INTERNAL (its issue
    36066; measured: half of the calls that are refused while they write). Callbacks run before that, with the status.
    """

    def __init__(self, call: Any) -> None:
        self.ended: grpc.aio.AioRpcError | None = None
        call.add_done_callback(self._note)

    def instead_of(self, error: grpc.aio.AioRpcError) -> grpc.aio.AioRpcError:
        """The peer's own error, where there was one."""
        return self.ended or error

    def _note(self, call: Any) -> None:
        code, details, trailing = (_finished(each) for each in (call.code(), call.details(), call.trailing_metadata()))
        if code is grpc.StatusCode.OK:  # nobody asks for it unless there was more to write or to read
            details = ENDED_EARLY
        self.ended = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details)


def _finished(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("a call that is done has its status")


@dataclass
class Told:
    """What a status's details say; the fields are those of AvatarError, the reason is empty if there were none."""

    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    violations: tuple[tuple[str, str], ...] = ()
    retry_s: float | None = None


def told(error: grpc.aio.AioRpcError) -> Told:
    """The details of an error: google.rpc.ErrorInfo, BadRequest and RetryInfo. None of them if they cannot be read."""
    try:
        return _told(error)
    except DecodeError:
        return Told()


def _told(error: grpc.aio.AioRpcError) -> Told:
    found = Told()
    trailing: Any = error.trailing_metadata() or ()
    status = next((value for key, value in trailing if key == DETAILS), b"")
    for packed in _fields(status)[3]:
        detail = any_pb2.Any.FromString(packed)
        content = _fields(detail.value)
        match detail.TypeName():
            case "google.rpc.ErrorInfo":
                found.reason = _text(content[1])
                entries = [_fields(each) for each in content[3]]
                found.metadata = {_text(entry[1]): _text(entry[2]) for entry in entries}
            case "google.rpc.BadRequest":
                violations = [_fields(each) for each in content[1]]
                found.violations = tuple((_text(each[1]), _text(each[2])) for each in violations)
            case "google.rpc.RetryInfo":
                delay = duration_pb2.Duration.FromString(b"".join(content[1]))
                found.retry_s = delay.ToMilliseconds() / 1000
    return found


def error_of(error: grpc.aio.AioRpcError) -> AvatarError:
    """The error that a gateway's status stands for. ConnectionLost where there was no gateway to say anything.

    A reason that this version does not know is an AvatarError of that reason.
    """
    details = told(error)
    text = error.details() or error.code().name
    if details.reason:
        kind = REASONS.get(details.reason, AvatarError)
    elif error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
        kind = MessageTooLarge
    else:
        kind = ConnectionLost if error.code() in LOST else AvatarError
    known = kind(text, metadata=details.metadata, violations=details.violations, retry_s=details.retry_s)
    if details.reason:
        known.reason = details.reason  # type: ignore[misc]  # of this one error, where the class has none
    return known


def _fields(message: bytes) -> dict[int, list[bytes]]:
    """The bytes of each field of a message whose type is not at hand."""
    found: defaultdict[int, list[bytes]] = defaultdict(list)
    fields: Any = UnknownFieldSet(empty_pb2.Empty.FromString(message))  # a sequence; its stub does not say so
    for each in fields:
        found[each.field_number].append(each.data)
    return found


def _text(values: list[bytes]) -> str:
    return b"".join(values[-1:]).decode(errors="replace")
