"""Errors as the public contract requires them."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status


@dataclass
class Refusal:
    """An error's parts, once it has happened."""

    message: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    fields: list[str] = field(default_factory=list)
    retry_s: float = 0.0

    @property
    def retries(self) -> bool:
        return self.retry_s > 0


@asynccontextmanager
async def refused(code: grpc.StatusCode, reason: str) -> AsyncGenerator[Refusal, None]:
    """The body ends in an error of this status, with ErrorInfo of this reason."""
    refusal = Refusal()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield refusal
    error = caught.value
    assert error.code() is code, error.details()
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
    assert [(info.domain, info.reason) for info in infos] == [("avatar", reason)]
    refusal.message = error.details() or ""
    refusal.metadata = dict(infos[0].metadata)
