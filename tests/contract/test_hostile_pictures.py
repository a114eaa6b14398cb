"""Pictures that are made to hurt: each is refused with its reason, and the streams of others lose no frame."""

from __future__ import annotations

import pytest

from avatar.aio import background
from tests.blocks import BLOCK_FRAMES, FIRST_FRAME, end_frame
from tests.conftest import speech
from tests.product import (
    CLOSE,
    Streamed,
    Stub,
    finish,
    new_reference,
    new_session,
    open_stream,
    pieces,
    read_frames,
    send,
)
from tests.refusals import refused
from tests.vae.picture.files import progressive_jpeg, webp_header, with_empty_segments

SECONDS = 3.0


PICTURES = [
    (progressive_jpeg(8192, 8192, 2500), "67.1 megapixels, at most 50 are accepted"),
    (progressive_jpeg(4096, 4096, 10_000), "more than 100 scans"),
    (webp_header(16_383, 16_383), "268.4 megapixels"),
]


async def test_hostile_pictures_are_refused_and_others_lose_no_frame(stub: Stub, portrait: bytes) -> None:
    await while_another_streams(stub, portrait, PICTURES)


@pytest.mark.slow
async def test_pictures_that_take_all_of_their_time_are_refused_and_others_lose_no_frame(
    stub: Stub, portrait: bytes
) -> None:
    await while_another_streams(stub, portrait, [(with_empty_segments(1_900_000), "takes too long to decode")] * 3)


async def while_another_streams(stub: Stub, portrait: bytes, pictures: list[tuple[bytes, str]]) -> None:
    """Send pictures in the middle of a stream; each must be refused with its words."""
    session = await new_session(stub, portrait)
    data, streamed = speech(SECONDS), Streamed()
    call, _ = await open_stream(stub, session.id)
    await send(call, pieces(data[: len(data) // 2]))
    await read_frames(call, streamed, 2 * BLOCK_FRAMES - FIRST_FRAME)

    async def be_refused() -> None:
        for picture, words in pictures:
            async with refused("INVALID_FIELD") as refusal:
                await new_reference(stub, picture)
            assert refusal.fields == ["picture"]
            assert words in refusal.message

    async with background(be_refused()) as refusing:
        await send(call, pieces(data[len(data) // 2 :]))
        await finish(call, (CLOSE,), streamed)
        await refusing
    assert streamed.indexes == list(range(FIRST_FRAME, end_frame(SECONDS)))
    assert not any(frame.is_discontinuity for frame in streamed.frames)
    assert (await new_reference(stub, portrait)).id
