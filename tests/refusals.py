"""The form of an error in the public contract: a status with ErrorInfo, and BadRequest or RetryInfo where they help."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from avatar.errors import REASONS


@dataclass
class Refusal:
    """The parts of an error, set once it has been raised. fields: those that BadRequest names."""

    message: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    fields: list[str] = field(default_factory=list)
    retry_s: float = 0.0


@asynccontextmanager
async def refused(*reasons: str) -> AsyncGenerator[Refusal, None]:
    """Expect the body to raise an error whose ErrorInfo has one of these reasons, with the reason's status."""
    refusal = Refusal()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield refusal
    error = caught.value
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None, f"no details with {error.details()}"
    infos = []
    for detail in status.details:
        info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            infos.append(info)
        elif detail.Unpack(bad):
            refusal.fields = [violation.field for violation in bad.field_violations]
        elif detail.Unpack(retry):
            refusal.retry_s = retry.retry_delay.ToMilliseconds() / 1000
    [info] = infos
    assert info.domain == "avatar"
    assert info.reason in reasons
    assert error.code() is REASONS[info.reason].code, error.details()
    refusal.message = error.details() or ""
    refusal.metadata = dict(info.metadata)
