"""Errors that a client can act on, each with its reason and gRPC status.

protos/avatar/v1/avatar_service.proto documents the same reasons; tests compare the two.
"""

from typing import ClassVar, Self

from grpc import StatusCode

DOMAIN = "avatar"
REASONS: dict[str, type["AvatarError"]] = {}


class AvatarError(Exception):
    """An error with a reason and a status; of no subclass, a bug in the server.

    metadata: of google.rpc.ErrorInfo, beside the reason.
    violations: (field, description) pairs of google.rpc.BadRequest.
    retry_s: seconds to wait before another try, for google.rpc.RetryInfo.
    """

    reason: ClassVar[str] = "INTERNAL"
    code: ClassVar[StatusCode] = StatusCode.INTERNAL

    def __init_subclass__(cls, *, reason: str, code: StatusCode | None = None) -> None:
        """Register a subclass under its reason. code: by default that of its parent."""
        assert reason not in REASONS, f"two errors have the reason {reason}"
        cls.reason, cls.code = reason, code or cls.code
        REASONS[reason] = cls

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


REASONS[AvatarError.reason] = AvatarError


class InvalidField(AvatarError, reason="INVALID_FIELD", code=StatusCode.INVALID_ARGUMENT):
    """A field has an invalid value."""

    @classmethod
    def at(cls, field: str, description: str) -> Self:
        """Return the error that names one field."""
        return cls(f"{field}: {description}", violations=((field, description),))


class InvalidAudio(InvalidField, reason="INVALID_AUDIO"):
    """The audio or its format is invalid."""


class InvalidText(InvalidField, reason="INVALID_TEXT"):
    """Text cannot be spoken."""


class Unauthenticated(AvatarError, reason="UNAUTHENTICATED", code=StatusCode.UNAUTHENTICATED):
    """The call carries no bearer token, or an unknown one."""


class ReferenceNotFound(AvatarError, reason="REFERENCE_NOT_FOUND", code=StatusCode.NOT_FOUND):
    """The reference does not exist, or belongs to another tenant."""


class SessionNotFound(AvatarError, reason="SESSION_NOT_FOUND", code=StatusCode.NOT_FOUND):
    """The session does not exist, or belongs to another tenant."""


class SessionBusy(AvatarError, reason="SESSION_BUSY", code=StatusCode.FAILED_PRECONDITION):
    """Another stream of the session is open."""


class SessionClosed(AvatarError, reason="SESSION_CLOSED", code=StatusCode.FAILED_PRECONDITION):
    """The session's stream has ended."""


class NotStreaming(AvatarError, reason="NOT_STREAMING", code=StatusCode.FAILED_PRECONDITION):
    """No stream of the session is open, or it is open elsewhere: metadata `gateway` and `cell` say where."""


class ProtocolOrder(AvatarError, reason="PROTOCOL_ORDER", code=StatusCode.FAILED_PRECONDITION):
    """A message arrived out of order."""


class PromptUnsupported(AvatarError, reason="PROMPT_UNSUPPORTED", code=StatusCode.FAILED_PRECONDITION):
    """The checkpoint does not take a prompt."""


class VoiceUnsupported(AvatarError, reason="VOICE_UNSUPPORTED", code=StatusCode.FAILED_PRECONDITION):
    """The deployment has no voice."""


class ListenUnsupported(AvatarError, reason="LISTEN_UNSUPPORTED", code=StatusCode.FAILED_PRECONDITION):
    """The checkpoint does not listen."""


class ConfigMismatch(AvatarError, reason="CONFIG_MISMATCH", code=StatusCode.FAILED_PRECONDITION):
    """The workers of a deployment do not match each other."""


class ConnectionLost(AvatarError, reason="CONNECTION_LOST", code=StatusCode.CANCELLED):
    """A stream ended without `close`."""


class SlowReader(AvatarError, reason="SLOW_READER", code=StatusCode.ABORTED):
    """The client read no frame for too long."""


class SilentClient(AvatarError, reason="SILENT_CLIENT", code=StatusCode.ABORTED):
    """The client sent nothing for too long, and was owed no frames."""


class ResumeImpossible(AvatarError, reason="RESUME_IMPOSSIBLE", code=StatusCode.OUT_OF_RANGE):
    """The frames that a client lacks are no longer kept."""


class NoCapacity(AvatarError, reason="NO_CAPACITY", code=StatusCode.RESOURCE_EXHAUSTED):
    """No worker of a stage can take the request now."""


class Draining(AvatarError, reason="DRAINING", code=StatusCode.UNAVAILABLE):
    """The cell is drained: it opens no new streams."""


class QuotaExceeded(AvatarError, reason="QUOTA_EXCEEDED", code=StatusCode.RESOURCE_EXHAUSTED):
    """The tenant has used up a quota; metadata `quota` names it."""


class MessageTooLarge(AvatarError, reason="MESSAGE_TOO_LARGE", code=StatusCode.RESOURCE_EXHAUSTED):
    """A picture, a piece of audio or a prompt is larger than its limit."""


class StageLost(AvatarError, reason="STAGE_LOST", code=StatusCode.UNAVAILABLE):
    """A worker is unreachable; metadata `stage` names its stage."""


class StageFailed(AvatarError, reason="STAGE_FAILED", code=StatusCode.INTERNAL):
    """A worker failed; metadata `stage` names its stage."""


class VoiceFailed(AvatarError, reason="VOICE_FAILED", code=StatusCode.UNAVAILABLE):
    """The speech engine failed."""


class StoreUnavailable(AvatarError, reason="STORE_UNAVAILABLE", code=StatusCode.UNAVAILABLE):
    """The session store is unreachable."""


class StateCorrupt(AvatarError, reason="STATE_CORRUPT", code=StatusCode.DATA_LOSS):
    """The session store returned damaged data."""
