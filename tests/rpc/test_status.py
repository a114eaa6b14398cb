"""Tests of avatar.rpc.status: an error's way to a status and back."""

import asyncio
from collections.abc import Callable
from functools import partial

import grpc
import grpc.aio
import pytest
from google.rpc import status_pb2
from grpc_status import rpc_status

from avatar.aio import background
from avatar.errors import REASONS, AvatarError, ConnectionLost, MessageTooLarge, NoCapacity, StageLost
from avatar.rpc.status import FAILED_WRITE, CallStatus, error_of, reason_of, status_of


def received(code: grpc.StatusCode, text: str, trailing: tuple[tuple[str, str | bytes], ...]) -> AvatarError:
    """Return the error of a call that ended with this status."""
    return error_of(grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), text))


def transferred(status: status_pb2.Status) -> AvatarError:
    """Return the error that a client makes of a server's status."""
    sent = rpc_status.to_status(status)
    return received(sent.code, sent.details, sent.trailing_metadata)


@pytest.mark.parametrize("kind", REASONS.values())
def test_every_error_arrives_as_it_was_raised(kind: type[AvatarError]) -> None:
    sent = kind("wrong: é", metadata={"stage": "vae"}, violations=(("a.b", "bad"), ("c", "worse")), retry_s=1.25)
    got = transferred(status_of(sent))
    assert type(got) is kind
    assert (got.message, got.metadata, got.violations, got.retry_s, got.reason) == (
        *(sent.message, sent.metadata, sent.violations, sent.retry_s, sent.reason),
    )


@pytest.mark.parametrize("text", ["all work", "proxy: all workers are full", ""])
def test_details_are_read_though_a_proxy_has_changed_the_text(text: str) -> None:
    sent = rpc_status.to_status(status_of(NoCapacity("all workers are full", retry_s=1.5)))
    got = received(sent.code, text, sent.trailing_metadata)
    assert (type(got), got.retry_s) == (NoCapacity, 1.5)


def test_each_kind_of_detail_occurs_once() -> None:
    status = status_of(NoCapacity("full", violations=(("a", "too long"), ("b", "too short")), retry_s=1.5))
    kinds = [detail.TypeName() for detail in status.details]
    assert kinds == ["google.rpc.ErrorInfo", "google.rpc.BadRequest", "google.rpc.RetryInfo"]


def test_a_reason_of_a_later_version_keeps_its_name() -> None:
    serialized = status_of(AvatarError("x")).SerializeToString()
    got = transferred(status_pb2.Status.FromString(serialized.replace(b"INTERNAL", b"TOMORROW")))
    assert (type(got), got.reason) == (AvatarError, "TOMORROW")
    assert AvatarError("y").reason == "INTERNAL"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, ConnectionLost),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, MessageTooLarge),
        (grpc.StatusCode.UNIMPLEMENTED, AvatarError),
    ],
)
@pytest.mark.parametrize("details", [None, b"\xff\xff"])
def test_an_error_without_usable_details_is_read_by_its_code(
    code: grpc.StatusCode, kind: type[AvatarError], details: bytes | None
) -> None:
    assert type(received(code, "x", (("grpc-status-details-bin", details),) if details else ())) is kind


def test_the_reason_of_an_error_is_found_in_groups_of_groups() -> None:
    lost = ExceptionGroup("", [ExceptionGroup("", [StageLost("gone"), RuntimeError()])])
    assert reason_of(lost) == "STAGE_LOST"
    assert reason_of(ExceptionGroup("", [KeyError("a"), OSError()])) == "INTERNAL"
    assert reason_of(asyncio.CancelledError()) == "CONNECTION_LOST"
    assert reason_of(AvatarError("ours")) == "INTERNAL"


class EndingCall:
    """A call of grpc.aio as CallStatus sees it. A later status replaces an earlier one, as after a failed write."""

    def __init__(self) -> None:
        self._record: Callable[[], None] = lambda: None
        self._status = (grpc.StatusCode.OK, "")

    def add_done_callback(self, record: Callable[["EndingCall"], None]) -> None:
        self._record = partial(record, self)

    async def code(self) -> grpc.StatusCode:
        return self._status[0]

    async def details(self) -> str:
        return self._status[1]

    async def trailing_metadata(self) -> grpc.aio.Metadata:
        return grpc.aio.Metadata()

    def end(self, code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
        """End with a status; return the error that reading raises."""
        self._status = (code, details)
        self._record()
        return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details)


@pytest.mark.parametrize("is_first", [True, False])
async def test_the_peers_status_counts_instead_of_a_failed_write(is_first: bool) -> None:
    """Also where it comes behind the failed write and the last message."""
    call = EndingCall()
    status = CallStatus(call)
    if is_first:
        call.end(grpc.StatusCode.RESOURCE_EXHAUSTED, "quota")
    error = call.end(grpc.StatusCode.INTERNAL, FAILED_WRITE)

    async def follow() -> None:
        await asyncio.sleep(0.01)
        call.end(grpc.StatusCode.RESOURCE_EXHAUSTED, "quota")

    async with background(follow()):
        ended = await status.instead_of(error)
    assert (ended.code(), ended.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "quota")


async def test_a_failed_write_counts_where_no_status_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("avatar.rpc.status.STATUS_S", 0.01)
    call = EndingCall()
    status = CallStatus(call)
    error = call.end(grpc.StatusCode.INTERNAL, FAILED_WRITE)
    assert await status.instead_of(error) is error
