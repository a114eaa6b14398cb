"""A checkpoint that listens and takes face motion, served: the same bytes as in one process, also after a loss."""

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
import torch

from avatar.audio.model import load
from avatar.checkpoints.layouts import open_part
from avatar.rpc.channel import channel
from avatar.rpc.client import remote_audio
from avatar.rpc.codec import block_from_wire
from avatar.rpc.server import serving
from avatar.runtime.device_queue import DeviceQueue
from avatar.settings import AudioSettings
from avatar.store.sessions import SessionStore
from avatar.types import AudioPiece, HeardAudio, Session
from avatar.worker.v1 import audio_pb2 as pb
from services.audio.__main__ import build
from tests.conftest import speech
from tests.services.test_recovery import breakable, half_spoken
from tests.services.test_suite import rendered

SECONDS = 3.0
BLOCK = 7680
INPUTS = ("heard", "face_motion")


async def test_losing_any_worker_changes_no_frame_of_a_moving_face(
    listening_checkpoint: Path, store: SessionStore, picture: bytes
) -> None:
    async with (
        breakable(listening_checkpoint, store, "audio", "denoisers") as broken,
        half_spoken(broken.target, picture, speech(SECONDS), 10) as streamed,
    ):
        for proxy in broken.proxies.values():
            proxy.cut()
    assert streamed.pixels == rendered(listening_checkpoint, picture, speech(SECONDS), seed=7)
    assert streamed.pixels != rendered(listening_checkpoint, picture, speech(SECONDS), seed=8)


@pytest.mark.parametrize("inputs", [INPUTS, ()], ids=["listening", "deaf"])
async def test_a_worker_makes_the_inputs_that_a_stream_asks_for(
    listening_checkpoint: Path, inputs: tuple[str, ...]
) -> None:
    own, other = speech(4 * 0.48, 1), speech(4 * 0.48, 2)

    async def pieces() -> AsyncGenerator[pb.AudioPiece, None]:
        for index in range(4):
            span = slice(2 * BLOCK * index, 2 * BLOCK * (index + 1))
            piece = pb.AudioPiece(data=own[span], completes=index)
            piece.heard.add(
                data=other[span], encoding="pcm16", rate_hz=16000, num_channels=1, first_sample=index * BLOCK
            )
            yield piece

    with DeviceQueue() as queue:
        servicer = build(AudioSettings(checkpoint=listening_checkpoint), queue)
        async with serving("127.0.0.1:0", servicer) as port, channel(f"127.0.0.1:{port}") as connection:
            stage = remote_audio(connection)
            opened = pb.OpenEncode(
                session_id="a", encoding="pcm16", rate_hz=16000, num_channels=1, seed=5, inputs=inputs
            )
            await stage.open(opened)
            received = [block_from_wire(block, None) async for block in stage(pieces())]

    model = load(open_part(listening_checkpoint, "audio"))
    state = model.open(Session("a", 5, torch.zeros(0)), inputs)
    samples = [torch.frombuffer(bytearray(each), dtype=torch.int16)[None] / 32768 for each in (own, other)]
    expected = []
    for index in range(4):
        mine, heard = (each[:, index * BLOCK : (index + 1) * BLOCK] for each in samples)
        piece = AudioPiece(mine, 16000, completes=index, heard=[HeardAudio(heard, 16000, index * BLOCK)])
        expected += model.step(piece, state)
    assert len(received) == 4
    for one, two in zip(received, expected, strict=True):
        assert torch.equal(one.features, two.features)
        for name in INPUTS:
            arrived, made = getattr(one, name), getattr(two, name)
            assert (arrived is None) == (made is None) == (name not in inputs)
            assert arrived is None or torch.equal(arrived, made)
