"""References: what a picture must be, and that it is named by its content."""

from __future__ import annotations

from io import BytesIO

import pytest
from grpc import StatusCode
from PIL import Image

from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import types_pb2 as types
from tests.contract.refusals import refused
from tests.product import Stub


def picture_file(width: int, height: int, kind: str = "PNG") -> bytes:
    file = BytesIO()
    Image.new("RGB", (width, height), (200, 120, 90)).save(file, kind)
    return file.getvalue()


async def test_the_same_picture_gives_the_same_reference(stub: Stub, portrait: bytes) -> None:
    request = pb.CreateReferenceRequest(picture=portrait)
    first, second = [(await stub.CreateReference(request, timeout=60)).reference for _ in range(2)]
    assert first.id == second.id
    kept = (await stub.GetReference(pb.GetReferenceRequest(reference_id=first.id), timeout=10)).reference
    assert (kept.id, kept.width, kept.height, kept.fit) == (first.id, first.width, first.height, first.fit)
    assert kept.notice == first.notice
    assert kept.expire_time.seconds > 0


async def test_another_fit_gives_another_reference(stub: Stub, portrait: bytes) -> None:
    requests = [pb.CreateReferenceRequest(picture=portrait, fit=fit) for fit in (types.FIT_COVER, types.FIT_REFERENCE)]
    references = [(await stub.CreateReference(request, timeout=60)).reference for request in requests]
    assert references[0].id != references[1].id
    assert [reference.fit for reference in references] == [types.FIT_COVER, types.FIT_REFERENCE]


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
async def test_jpeg_and_webp_are_taken(stub: Stub, kind: str) -> None:
    request = pb.CreateReferenceRequest(picture=picture_file(96, 96, kind))
    assert (await stub.CreateReference(request, timeout=60)).reference.id


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        pytest.param(b"", "not a PNG", id="nothing"),
        pytest.param(b"just some text", "not a PNG", id="text"),
        pytest.param(picture_file(1, 1), "too small", id="1x1"),
        pytest.param(picture_file(20_000, 16), "too large", id="20000 pixels"),
        pytest.param(picture_file(200, 200)[:300], "damaged or cut short", id="truncated png"),
        pytest.param(picture_file(200, 200, "JPEG")[:700], "damaged or cut short", id="truncated jpeg"),
    ],
)
async def test_a_bad_picture_is_refused_with_the_field_named(
    stub: Stub, portrait: bytes, picture: bytes, words: str
) -> None:
    async with refused(StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") as refusal:
        await stub.CreateReference(pb.CreateReferenceRequest(picture=picture), timeout=60)
    assert refusal.fields == ["picture"]
    assert words in refusal.message
    assert (await stub.CreateReference(pb.CreateReferenceRequest(picture=portrait), timeout=60)).reference.id


async def test_a_picture_over_the_limit_is_refused(stub: Stub) -> None:
    limit = (await stub.GetCapabilities(pb.GetCapabilitiesRequest(), timeout=10)).max_picture_bytes
    async with refused(StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE") as refusal:
        await stub.CreateReference(pb.CreateReferenceRequest(picture=bytes(limit + 1)), timeout=60)
    assert str(limit) in refusal.message


async def test_a_size_that_is_not_to_be_had_is_refused(stub: Stub, portrait: bytes) -> None:
    async with refused(StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") as refusal:
        await stub.CreateReference(pb.CreateReferenceRequest(picture=portrait, width=100, height=7), timeout=60)
    assert refusal.fields == ["width"]


@pytest.mark.parametrize(("area", "side"), [(1, 0), (1 << 31, 0), (4096, 64)])
async def test_an_area_that_is_not_to_be_had_is_refused(stub: Stub, portrait: bytes, area: int, side: int) -> None:
    request = pb.CreateReferenceRequest(picture=portrait, area=area, width=side, height=side)
    async with refused(StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"):
        await stub.CreateReference(request, timeout=60)


async def test_an_unknown_fit_is_refused(stub: Stub, portrait: bytes) -> None:
    async with refused(StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") as refusal:
        await stub.CreateReference(
            pb.CreateReferenceRequest(picture=portrait, fit=99),  # type: ignore[arg-type]
            timeout=60,
        )
    assert refusal.fields == ["fit"]


async def test_a_deleted_reference_is_gone_and_its_sessions_are_not(stub: Stub, portrait: bytes) -> None:
    picture = pb.CreateReferenceRequest(picture=portrait)
    reference = (await stub.CreateReference(picture, timeout=60)).reference
    session = (await stub.CreateSession(pb.CreateSessionRequest(reference_id=reference.id), timeout=10)).session
    await stub.DeleteReference(pb.DeleteReferenceRequest(reference_id=reference.id), timeout=10)
    async with refused(StatusCode.NOT_FOUND, "REFERENCE_NOT_FOUND"):
        await stub.GetReference(pb.GetReferenceRequest(reference_id=reference.id), timeout=10)
    async with refused(StatusCode.NOT_FOUND, "REFERENCE_NOT_FOUND"):
        await stub.CreateSession(pb.CreateSessionRequest(reference_id=reference.id), timeout=10)
    assert (await stub.GetSession(pb.GetSessionRequest(session_id=session.id), timeout=10)).session.id == session.id
