"""That the details of a status are read as google.rpc's own package writes them."""

import grpc
import grpc.aio
import pytest

from avatar.errors import REASONS, AvatarError, ConnectionLost, MessageTooLarge
from avatar.rpc.server import status_of
from avatar.rpc.status import DETAILS, error_of


def came(code: grpc.StatusCode, message: str, details: bytes) -> AvatarError:
    """An error after its way over the wire."""
    trailing = grpc.aio.Metadata((DETAILS, details)) if details else grpc.aio.Metadata()
    return error_of(grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, message))


@pytest.mark.parametrize("kind", REASONS.values())
def test_every_error_comes_as_it_was_raised(kind: type[AvatarError]) -> None:
    sent = kind("wrong: é", metadata={"stage": "vae"}, violations=(("a.b", "bad"), ("c", "worse")), retry_s=1.25)
    got = came(sent.code, sent.message, status_of(sent).SerializeToString())
    assert type(got) is kind
    assert (got.message, got.metadata, got.violations, got.retry_s, got.reason) == (
        *(sent.message, sent.metadata, sent.violations, sent.retry_s, sent.reason),
    )


def test_a_reason_of_a_later_version_keeps_its_name() -> None:
    status = status_of(AvatarError("x")).SerializeToString().replace(b"INTERNAL", b"TOMORROW")
    got = came(grpc.StatusCode.ABORTED, "x", status)
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
@pytest.mark.parametrize("details", [b"", b"\xff\xff"])
def test_an_error_without_details_is_of_its_code(
    code: grpc.StatusCode, kind: type[AvatarError], details: bytes
) -> None:
    assert type(came(code, "x", details)) is kind
