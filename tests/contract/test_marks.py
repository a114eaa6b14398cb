"""Marks in frames which say that a machine made them: those that `opened` names are there."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TypeAlias

import numpy as np
import pytest

from avatar.settings import GatewaySettings
from avatar.store.sessions import SessionStore
from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import types_pb2 as types
from avatar.vae.marks.label import draw_label
from services.local.suite import gateway as run_gateway
from tests.conftest import speech
from tests.product import CLOSE, Streamed, Stub, connected, finish, new_session, open_stream, pieces
from tests.readers import GENERATED, mark_of_jpeg, marks_of_film

Encoding: TypeAlias = types.VideoEncoding.ValueType
Mark: TypeAlias = types.Mark.ValueType
RGB24, JPEG, H264, FMP4 = types.VideoEncoding.values()[1:]
XMP, SEI, LABEL = types.MARK_XMP, types.MARK_SEI, types.MARK_LABEL
MARKS: dict[Encoding, list[Mark]] = {
    RGB24: [],
    JPEG: [XMP],
    H264: [SEI],
    FMP4: [XMP, SEI],
}


async def streamed(stub: Stub, session: types.Session, encoding: Encoding) -> tuple[pb.AvatarOpened, Streamed]:
    output = types.VideoOutput(encoding=encoding)
    call, opened = await open_stream(stub, session.id, output=output)
    return opened, await finish(call, [*pieces(speech(0.48)), CLOSE])


def found_in(opened: pb.AvatarOpened, frames: list[bytes], encoding: Encoding) -> list[Mark]:
    """Return the marks for machines that are in all of the frames."""
    if encoding == RGB24:
        return []
    if encoding == JPEG:
        return [XMP] if {mark_of_jpeg(frame) for frame in frames} == {GENERATED} else []
    metadata, key_frames = marks_of_film(opened.init_segment + b"".join(frames), "h264" if encoding == H264 else "mp4")
    return [XMP] * (metadata == GENERATED) + [SEI] * (set(key_frames) == {GENERATED})


@pytest.mark.parametrize("encoding", MARKS)
async def test_opened_names_the_marks_in_the_frames(stub: Stub, portrait: bytes, encoding: Encoding) -> None:
    opened, output = await streamed(stub, await new_session(stub, portrait), encoding)
    assert list(opened.marks) == MARKS[encoding] == found_in(opened, output.pixels, encoding)


async def test_a_labelled_session_shows_the_label_and_nothing_else_changes(stub: Stub, portrait: bytes) -> None:
    plain, session = [await new_session(stub, portrait, seed=3, label=label) for label in (False, True)]
    assert (plain.label, session.label) == (False, True)
    (_, truth), (opened, output) = [await streamed(stub, each, RGB24) for each in (plain, session)]
    assert list(opened.marks) == [LABEL]
    assert opened.session.label
    expected = np.stack([np.frombuffer(frame, np.uint8) for frame in truth.pixels])
    expected = expected.reshape(-1, session.video.height, session.video.width, 3).copy()
    draw_label(expected)
    assert output.pixels == [frame.tobytes() for frame in expected]


async def test_a_label_is_one_mark_of_several(stub: Stub, portrait: bytes) -> None:
    opened, _ = await streamed(stub, await new_session(stub, portrait, label=True), FMP4)
    assert list(opened.marks) == [XMP, SEI, LABEL]


@pytest.mark.parametrize("quotas", ["label = true"])
async def test_all_sessions_of_a_tenant_can_have_the_label(acme: Stub, globex: Stub, portrait: bytes) -> None:
    assert [(await new_session(each, portrait)).label for each in (acme, globex)] == [True, False]


@asynccontextmanager
async def unmarking(store: SessionStore, settings: GatewaySettings) -> AsyncGenerator[Stub, None]:
    async with run_gateway(store, settings.model_copy(update={"marks": False})) as target, connected(target) as stub:
        yield stub


async def test_an_operator_can_turn_marks_off_and_the_log_says_so(
    shared_workers: GatewaySettings, store: SessionStore, portrait: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with unmarking(store, shared_workers) as stub:
        for encoding in (JPEG, FMP4):
            opened, output = await streamed(stub, await new_session(stub, portrait), encoding)
            assert list(opened.marks) == found_in(opened, output.pixels, encoding) == []
        opened, _ = await streamed(stub, await new_session(stub, portrait, label=True), JPEG)
        assert list(opened.marks) == [LABEL]
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings.count("frames carry no machine-readable marks: AVATAR_MARKS is false") == 1
