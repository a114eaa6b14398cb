"""References: pictures that are accepted, and names that depend on the content alone."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import pytest
from PIL import Image

from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import types_pb2 as types
from tests.product import Stub, new_reference
from tests.refusals import refused


def picture_file(width: int, height: int, kind: str = "PNG") -> bytes:
    file = BytesIO()
    Image.new("RGB", (width, height), (200, 120, 90)).save(file, kind)
    return file.getvalue()


async def test_equal_pictures_give_one_reference(stub: Stub, portrait: bytes) -> None:
    first, second = [await new_reference(stub, portrait) for _ in range(2)]
    assert first.id == second.id
    kept = (await stub.GetReference(pb.GetReferenceRequest(reference_id=first.id), timeout=10)).reference
    assert (kept.id, kept.width, kept.height, kept.fit) == (first.id, first.width, first.height, first.fit)
    assert kept.notice == first.notice
    assert kept.expire_time.seconds > 0


async def test_another_fit_gives_another_reference(stub: Stub, portrait: bytes) -> None:
    fits = [types.FIT_COVER, types.FIT_REFERENCE, types.FIT_FACE]
    references = [await new_reference(stub, portrait, fit=fit) for fit in fits]
    assert len({reference.id for reference in references}) == len(fits)
    assert [reference.fit for reference in references] == fits


def beside(portrait: bytes, *spots: tuple[int, int, int]) -> bytes:
    """Return a grey landscape with a portrait at each (left, top, side), in pixels."""
    landscape = Image.new("RGB", (800, 450), (120, 140, 120))
    for left, top, side in spots:
        landscape.paste(Image.open(BytesIO(portrait)).resize((side, side)), (left, top))
    file = BytesIO()
    landscape.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("spots", "num_faces", "words"),
    [
        ([(560, 120, 200)], 1, ""),
        ([(560, 120, 200), (100, 150, 160)], 2, "2 faces were found"),
        ([(560, 120, 36)], 1, "The face is too small"),
        ([], 0, "No face was found"),
    ],
)
async def test_a_reference_says_which_faces_were_found(
    stub: Stub, portrait: bytes, spots: list[tuple[int, int, int]], num_faces: int, words: str
) -> None:
    first = await new_reference(stub, beside(portrait, *spots), fit=types.FIT_FACE)
    assert (first.fit, first.num_faces) == (types.FIT_FACE, num_faces)
    expected = (0.56 * spots[0][2]) ** 2 / (800 * 450) if spots else 0
    assert first.face_share == pytest.approx(expected, rel=0.2)
    assert first.notice.startswith(words)
    kept = (await stub.GetReference(pb.GetReferenceRequest(reference_id=first.id), timeout=10)).reference
    assert (kept.num_faces, kept.face_share, kept.notice) == (num_faces, first.face_share, first.notice)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
async def test_jpeg_and_webp_are_accepted(stub: Stub, kind: str) -> None:
    assert (await new_reference(stub, picture_file(96, 96, kind))).id


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
async def test_a_bad_picture_is_refused_with_its_field(stub: Stub, portrait: bytes, picture: bytes, words: str) -> None:
    async with refused("INVALID_FIELD") as refusal:
        await new_reference(stub, picture)
    assert refusal.fields == ["picture"]
    assert words in refusal.message
    assert (await new_reference(stub, portrait)).id


async def test_a_picture_over_the_limit_is_refused(stub: Stub, capabilities: pb.GetCapabilitiesResponse) -> None:
    limit = capabilities.max_picture_bytes
    async with refused("MESSAGE_TOO_LARGE") as refusal:
        await new_reference(stub, bytes(limit + 1))
    assert str(limit) in refusal.message


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"width": 100, "height": 7}, ["width"]),
        ({"area": 1}, ["area"]),
        ({"area": 1 << 31}, ["area"]),
        ({"area": 4096, "width": 64, "height": 64}, ["area"]),
        ({"fit": 99}, ["fit"]),
    ],
    ids=str,
)
async def test_an_unsupported_size_or_fit_is_refused_with_its_field(
    stub: Stub, portrait: bytes, fields: dict[str, Any], named: list[str]
) -> None:
    async with refused("INVALID_FIELD") as refusal:
        await new_reference(stub, portrait, **fields)
    assert refusal.fields == named


async def test_sessions_outlive_their_deleted_reference(stub: Stub, portrait: bytes) -> None:
    reference = await new_reference(stub, portrait)
    create = pb.CreateSessionRequest(reference_id=reference.id)
    session = (await stub.CreateSession(create, timeout=10)).session
    await stub.DeleteReference(pb.DeleteReferenceRequest(reference_id=reference.id), timeout=10)
    async with refused("REFERENCE_NOT_FOUND"):
        await stub.GetReference(pb.GetReferenceRequest(reference_id=reference.id), timeout=10)
    async with refused("REFERENCE_NOT_FOUND"):
        await stub.CreateSession(create, timeout=10)
    assert (await stub.GetSession(pb.GetSessionRequest(session_id=session.id), timeout=10)).session.id == session.id
