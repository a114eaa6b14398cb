"""What can go wrong in a way that a client can act on, and the gRPC status of each.

The table of reasons stands in protos/avatar/v1/avatar_service.proto; tests hold the two together.
"""

from typing import ClassVar

from grpc import StatusCode

DOMAIN = "avatar"


class AvatarError(Exception):
    """An error with a status.

    metadata: what google.rpc.ErrorInfo carries beside the reason.
    violations: (field, description) of google.rpc.BadRequest.
    retry_s: when to try again, in seconds, for google.rpc.RetryInfo.
    """

    reason: ClassVar[str] = "INTERNAL"
    code: ClassVar[StatusCode] = StatusCode.INTERNAL

    def __init__(
        self,
        message: str,
        *,
        metadata: dict[str, str] | None = None,
        violations: tuple[tuple[str, str], ...] = (),
        retry_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = metadata or {}
        self.violations = violations
        self.retry_s = retry_s


class InvalidField(AvatarError):
    """A field's value cannot be used."""

    reason = "INVALID_FIELD"
    code = StatusCode.INVALID_ARGUMENT

    @classmethod
    def at(cls, field: str, description: str) -> "InvalidField":
        """The error that blames one field."""
        return cls(f"{field}: {description}", violations=((field, description),))


class InvalidAudio(InvalidField):
    """Sound cannot be used."""

    reason = "INVALID_AUDIO"


class Unauthenticated(AvatarError):
    """The call carries no token that is known."""

    reason = "UNAUTHENTICATED"
    code = StatusCode.UNAUTHENTICATED


class ReferenceNotFound(AvatarError):
    """No reference of this name is kept."""

    reason = "REFERENCE_NOT_FOUND"
    code = StatusCode.NOT_FOUND


class SessionNotFound(AvatarError):
    """No session of this name is kept."""

    reason = "SESSION_NOT_FOUND"
    code = StatusCode.NOT_FOUND


class SessionBusy(AvatarError):
    """Another stream of the session is open."""

    reason = "SESSION_BUSY"
    code = StatusCode.FAILED_PRECONDITION


class SessionClosed(AvatarError):
    """The session's stream was closed."""

    reason = "SESSION_CLOSED"
    code = StatusCode.FAILED_PRECONDITION


class NotStreaming(AvatarError):
    """No stream of the session is open here."""

    reason = "NOT_STREAMING"
    code = StatusCode.FAILED_PRECONDITION


class ProtocolOrder(AvatarError):
    """A message came where it may not come."""

    reason = "PROTOCOL_ORDER"
    code = StatusCode.FAILED_PRECONDITION


class PromptUnsupported(AvatarError):
    """The checkpoint knows no text."""

    reason = "PROMPT_UNSUPPORTED"
    code = StatusCode.FAILED_PRECONDITION


class ConfigMismatch(AvatarError):
    """The workers of a deployment do not fit together."""

    reason = "CONFIG_MISMATCH"
    code = StatusCode.FAILED_PRECONDITION


class ConnectionLost(AvatarError):
    """A stream ended without close."""

    reason = "CONNECTION_LOST"
    code = StatusCode.CANCELLED


class SlowReader(AvatarError):
    """The client took no frame for too long."""

    reason = "SLOW_READER"
    code = StatusCode.ABORTED


class ResumeImpossible(AvatarError):
    """The frames that a client misses are no longer kept."""

    reason = "RESUME_IMPOSSIBLE"
    code = StatusCode.OUT_OF_RANGE


class NoCapacity(AvatarError):
    """Every worker of a stage is full."""

    reason = "NO_CAPACITY"
    code = StatusCode.RESOURCE_EXHAUSTED


class QuotaExceeded(AvatarError):
    """The caller uses all that it may; metadata `quota` names what of."""

    reason = "QUOTA_EXCEEDED"
    code = StatusCode.RESOURCE_EXHAUSTED


class MessageTooLarge(AvatarError):
    """A message has more bytes than the limits allow."""

    reason = "MESSAGE_TOO_LARGE"
    code = StatusCode.RESOURCE_EXHAUSTED


class StageLost(AvatarError):
    """A worker cannot be reached; metadata `stage` names its stage."""

    reason = "STAGE_LOST"
    code = StatusCode.UNAVAILABLE


class StageFailed(AvatarError):
    """A worker failed; metadata `stage` names its stage."""

    reason = "STAGE_FAILED"
    code = StatusCode.INTERNAL


class StoreUnavailable(AvatarError):
    """The session store cannot be reached."""

    reason = "STORE_UNAVAILABLE"
    code = StatusCode.UNAVAILABLE


class StateCorrupt(AvatarError):
    """The session store holds something else than what was written."""

    reason = "STATE_CORRUPT"
    code = StatusCode.DATA_LOSS


REASONS: dict[str, type[AvatarError]] = {
    each.reason: each
    for each in (
        InvalidField,
        InvalidAudio,
        Unauthenticated,
        ReferenceNotFound,
        SessionNotFound,
        SessionBusy,
        SessionClosed,
        NotStreaming,
        ProtocolOrder,
        PromptUnsupported,
        ConfigMismatch,
        ConnectionLost,
        SlowReader,
        ResumeImpossible,
        NoCapacity,
        QuotaExceeded,
        MessageTooLarge,
        StageLost,
        StageFailed,
        StoreUnavailable,
        StateCorrupt,
        AvatarError,
    )
}
