"""The encodings of frames: whatever the client asks for shows the same film, on the same clock."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import av
import numpy as np
import pytest
from PIL import Image

from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import types_pb2 as types
from tests.conftest import speech
from tests.product import CLOSE, INTERRUPT, Call, Streamed, Stub, answer, new_session, opening, pieces, rest, speak

if TYPE_CHECKING:
    from numpy.typing import NDArray


JPEG, H264, FMP4 = (
    types.VIDEO_ENCODING_JPEG,
    types.VIDEO_ENCODING_H264,
    types.VIDEO_ENCODING_FMP4,
)


async def begun(stub: Stub, session_id: str, output: types.VideoOutput) -> tuple[Call, pb.AvatarOpened]:
    call = stub.StreamAvatar(timeout=60)
    await call.write(opening(session_id, output=output))
    return call, (await answer(call)).opened


async def spoken_in(stub: Stub, session_id: str, output: types.VideoOutput, data: bytes) -> tuple[Streamed, bytes]:
    call, told = await begun(stub, session_id, output)
    for request in [*pieces(data), CLOSE]:
        await call.write(request)
    got = Streamed()
    for response in await rest(call):
        got.take(response)
    return got, told.init_segment


def shown(frames: list[types.VideoFrame], encoding: int, init: bytes) -> tuple[NDArray[np.uint8], list[int]]:
    """Return the frames that a client shows with their times, in frames; bare frames have only their message's time."""
    if encoding == JPEG:
        pictures = [np.asarray(Image.open(io.BytesIO(frame.data))) for frame in frames]
        return np.stack(pictures), [frame.index for frame in frames]
    container = "mp4" if encoding == FMP4 else "h264"
    with av.open(io.BytesIO(init + b"".join(frame.data for frame in frames)), "r", format=container) as film:
        decoded = list(film.decode(video=0))
        times = [round(float(each.time or 0) * 25) for each in decoded]
        return np.stack([each.to_ndarray(format="rgb24") for each in decoded]), times


@pytest.mark.parametrize("encoding", [JPEG, H264, FMP4])
async def test_every_encoding_shows_the_frames(
    stub: Stub, portrait: bytes, encoding: types.VideoEncoding.ValueType
) -> None:
    assert encoding in (await stub.GetCapabilities(pb.GetCapabilitiesRequest())).encodings
    data = speech(0.96)
    session, again = [await new_session(stub, portrait, seed=3) for _ in range(2)]
    raw = await speak(stub, session.id, data)
    got, init = await spoken_in(stub, again.id, types.VideoOutput(encoding=encoding, quality=95), data)
    height, width = session.video.height, session.video.width
    truth = np.stack([np.frombuffer(each, np.uint8).reshape(height, width, 3) for each in raw.pixels])
    pictures, times = shown(got.frames, encoding, init)
    assert pictures.shape == truth.shape
    assert np.abs(pictures.astype(float) - truth).mean() < 12
    assert got.frames[0].is_key
    assert sum(frame.num_frames for frame in got.frames) == len(truth) == got.closed.num_frames
    if encoding == FMP4:
        assert times == list(range(3, 3 + len(truth)))


async def test_a_block_comes_in_one_message_where_that_was_asked_for(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    got, _ = await spoken_in(stub, session.id, types.VideoOutput(encoding=H264, per_block=True), speech(0.96))
    assert [frame.index for frame in got.frames] == list(range(3, 24))
    assert [frame.is_key for frame in got.frames] == [number in (3, 12) for number in range(3, 24)]


async def test_fragments_keep_the_clock_over_an_interrupt(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    call, told = await begun(stub, session.id, types.VideoOutput(encoding=FMP4))
    got = Streamed()
    for request in pieces(speech(2.4)):
        await call.write(request)
    while not got.frames:
        got.take(await answer(call))
    await call.write(INTERRUPT)
    while not got.interrupted:
        got.take(await answer(call))
    for request in [*pieces(speech(0.96, seed=1)), CLOSE]:
        await call.write(request)
    for response in await rest(call):
        got.take(response)
    _, times = shown(got.frames, FMP4, told.init_segment)
    assert times == list(range(3, 3 + got.closed.num_frames))
    assert [frame.index for frame in got.frames] == times[:1] + times[9::12]
