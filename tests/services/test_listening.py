"""A checkpoint that listens and takes face motion, served: the same bytes as in one process, also after a loss."""

from __future__ import annotations

import functools
import logging
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from redis.asyncio import Redis

from avatar.audio.model import WARM_BLOCKS, AudioState, load
from avatar.checkpoints.layouts import open_part
from avatar.client import connect
from avatar.errors import InvalidAudio
from avatar.render import RenderOptions, render
from avatar.render import load as load_models
from avatar.rpc.channel import channel
from avatar.rpc.client import remote_audio
from avatar.rpc.codec import block_from_wire
from avatar.rpc.server import serving
from avatar.runtime.device_queue import DeviceQueue
from avatar.settings import AudioSettings, GatewaySettings
from avatar.store.sessions import SessionStore
from avatar.types import AudioPiece, Block, HeardAudio, Session
from avatar.worker.v1 import audio_pb2 as pb
from services.audio.__main__ import build
from services.local.suite import suite
from tests.conftest import speech
from tests.services.test_recovery import breakable, half_spoken
from tests.services.test_suite import rendered

SECONDS = 3.0
BLOCK = 7680
INPUTS = ("heard", "face_motion")


def samples_of(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.int16)[None] / 32768


@functools.cache
def rendered_listening(checkpoint: Path, picture: bytes, data: bytes, heard: bytes) -> list[bytes]:
    """Return the frames that the models give of a person who listens, without services."""
    models, other = load_models(checkpoint), samples_of(heard)
    step = models.audio.step

    def listen(piece: AudioPiece, state: AudioState) -> list[Block]:
        start = state.num_samples
        of_piece = HeardAudio(other[:, start : start + piece.samples.shape[1]], 16000, start)
        return step(replace(piece, heard=[of_piece]), state)

    models.audio.step = listen  # type: ignore[method-assign]
    chunks = render(models, [samples_of(data)], 16000, picture, RenderOptions(seed=7))
    return [frame.numpy().tobytes() for chunk in chunks for frame in chunk.frames]


async def test_losing_every_worker_while_it_listens_changes_no_frame(
    listening_checkpoint: Path, store: SessionStore, picture: bytes
) -> None:
    own, other = speech(SECONDS), speech(SECONDS, 2)
    async with (
        breakable(listening_checkpoint, store, "audio", "denoisers", "vae") as broken,
        half_spoken(broken.target, picture, own, 10, other) as streamed,
    ):
        for proxy in broken.proxies.values():
            proxy.cut()
    assert streamed.pixels == rendered_listening(listening_checkpoint, picture, own, other)
    assert streamed.pixels != rendered(listening_checkpoint, picture, own, seed=7)


async def test_what_is_heard_at_a_rate_of_its_own_changes_frames_and_is_in_no_log_or_record(
    listening_checkpoint: Path,
    store: SessionStore,
    redis_client: Redis,
    picture: bytes,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    own, other = speech(1.2), 960 * b"overheard!"  # at half the rate
    silent = rendered(listening_checkpoint, picture, own, seed=7)
    async with (
        suite(listening_checkpoint, store, GatewaySettings(listen="127.0.0.1:0")) as target,
        connect(target) as avatar,
    ):
        assert (await avatar.capabilities()).listens
        frames = []
        for heard in (b"", other):
            session = await avatar.create(picture, seed=7)
            async with session.stream(listen_rate_hz=8000) as stream:
                await stream.listen(heard)
                await stream.push(own)
                await stream.close()
                frames.append([frame.data async for frame in stream.frames()])
        assert frames[0] == silent, "without another person's audio nothing changes"
        assert frames[1] != silent
        assert caplog.records
        assert not [each for each in caplog.records if "overheard" in str(vars(each))]
        records = [await redis_client.dump(key) for key in await redis_client.keys()]
        assert records
        assert not [each for each in records if each and b"overheard" in each]
        session = await avatar.create(picture)
        async with session.stream(encoding="float32") as stream:
            await stream.listen(np.full(16000, np.nan, np.float32).tobytes())
            await stream.push(bytes(4 * 16000))
            with pytest.raises(InvalidAudio, match=r"listen.data: audio samples must be finite"):
                [item async for item in stream]


@pytest.mark.parametrize("is_listening", [True, False])
def test_a_worker_times_its_step_as_streams_take_it(
    listening_checkpoint: Path, checkpoint: Path, is_listening: bool
) -> None:
    encoder = type(load(open_part(checkpoint, "audio")).encoder)
    with DeviceQueue() as queue, patch.object(encoder, "encode", autospec=True, side_effect=encoder.encode) as encoded:
        build(AudioSettings(checkpoint=listening_checkpoint if is_listening else checkpoint), queue)
    assert encoded.call_count == 2 * WARM_BLOCKS * (1 + is_listening)


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
    samples = [samples_of(each) for each in (own, other)]
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
