"""Encodings of frames: each shows the same film at the same times."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import av
import numpy as np
import pytest
from PIL import Image

from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import types_pb2 as types
from tests.blocks import BLOCK_FRAMES
from tests.conftest import speech
from tests.product import (
    CLOSE,
    INTERRUPT,
    Streamed,
    Stub,
    answer,
    finish,
    new_session,
    open_stream,
    opening,
    pieces,
    read_frames,
    send,
    speak,
    stream,
)
from tests.refusals import refused

if TYPE_CHECKING:
    from numpy.typing import NDArray

JPEG, H264, FMP4 = (
    types.VIDEO_ENCODING_JPEG,
    types.VIDEO_ENCODING_H264,
    types.VIDEO_ENCODING_FMP4,
)


def decoded(frames: list[types.VideoFrame], encoding: int, init: bytes) -> tuple[NDArray[np.uint8], list[int]]:
    """Return pictures, (f, h, w, c), and their times in frames; a message's own index where a file has no times."""
    if encoding == JPEG:
        pictures = [np.asarray(Image.open(io.BytesIO(frame.data))) for frame in frames]
        return np.stack(pictures), [frame.index for frame in frames]
    container = "mp4" if encoding == FMP4 else "h264"
    with av.open(io.BytesIO(init + b"".join(frame.data for frame in frames)), "r", format=container) as film:
        found = list(film.decode(video=0))
        times = [round(float(each.time or 0) * 25) for each in found]
        return np.stack([each.to_ndarray(format="rgb24") for each in found]), times


@pytest.mark.parametrize("per_latent", [False, True])
@pytest.mark.parametrize("encoding", [JPEG, H264, FMP4])
async def test_every_encoding_shows_the_frames(
    stub: Stub,
    portrait: bytes,
    capabilities: pb.GetCapabilitiesResponse,
    encoding: types.VideoEncoding.ValueType,
    per_latent: bool,
) -> None:
    assert encoding in capabilities.encodings
    data = speech(0.96)
    session, again = [await new_session(stub, portrait, seed=3) for _ in range(2)]
    raw = await speak(stub, session.id, data)
    output = types.VideoOutput(encoding=encoding, quality=95, per_latent=per_latent)
    call, opened = await open_stream(stub, again.id, output=output)
    streamed = await finish(call, [*pieces(data), CLOSE])
    height, width = session.video.height, session.video.width
    truth = np.stack([np.frombuffer(each, np.uint8).reshape(height, width, 3) for each in raw.pixels])
    pictures, times = decoded(streamed.frames, encoding, opened.init_segment)
    assert pictures.shape == truth.shape
    assert np.abs(pictures.astype(float) - truth).mean() < 12
    if encoding == H264:
        keys = (3, *range(4, 24, 4)) if per_latent else (3, *range(BLOCK_FRAMES, 24, BLOCK_FRAMES))
        assert [frame.is_key for frame in streamed.frames] == [index in keys for index in range(3, 24)]
    assert streamed.frames[0].is_key
    assert sum(frame.num_frames for frame in streamed.frames) == len(truth) == streamed.closed.num_frames
    if encoding == FMP4:
        size = 4 if per_latent else BLOCK_FRAMES
        groups = [size - 3, *[size] * (24 // size - 1)]
        assert times == list(range(3, 3 + len(truth)))
        assert [frame.num_frames for frame in streamed.frames] == groups


async def test_frames_can_be_sent_in_one_message_a_block(stub: Stub, portrait: bytes) -> None:
    sessions = [await new_session(stub, portrait, seed=1) for _ in range(2)]
    output = types.VideoOutput(per_block=True)
    whole = await stream(stub, [opening(sessions[0].id, output=output), *pieces(speech(0.96)), CLOSE])
    single = await speak(stub, sessions[1].id, speech(0.96))
    assert whole.pixels == single.pixels
    assert whole.indexes == list(range(3, 24))


async def test_an_unsupported_encoding_is_refused_with_its_field(
    stub: Stub, portrait: bytes, capabilities: pb.GetCapabilitiesResponse
) -> None:
    session = await new_session(stub, portrait)
    assert types.VIDEO_ENCODING_RGB24 in capabilities.encodings
    missing = [each for each in (*types.VideoEncoding.values()[1:], 77) if each not in capabilities.encodings]
    for encoding in missing:
        async with refused("INVALID_FIELD") as refusal:
            await open_stream(stub, session.id, output=types.VideoOutput(encoding=encoding))  # type: ignore[arg-type]
        assert refusal.fields == ["open.output.encoding"]
    assert (await speak(stub, session.id, speech(0.48))).frames


async def test_fragments_keep_their_times_after_an_interrupt(stub: Stub, portrait: bytes) -> None:
    session = await new_session(stub, portrait)
    call, opened = await open_stream(stub, session.id, output=types.VideoOutput(encoding=FMP4))
    streamed = Streamed()
    await send(call, pieces(speech(2.4)))
    await read_frames(call, streamed, 1)
    await send(call, [INTERRUPT])
    while not streamed.interrupted:
        streamed.add(await answer(call))
    await finish(call, [*pieces(speech(0.96, seed=1)), CLOSE], streamed)
    _, times = decoded(streamed.frames, FMP4, opened.init_segment)
    assert times == list(range(3, 3 + streamed.closed.num_frames))
    assert streamed.indexes == times[:1] + times[BLOCK_FRAMES - 3 :: BLOCK_FRAMES]
