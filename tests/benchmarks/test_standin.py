"""Stand-in workers follow the worker contract."""

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from avatar.rpc.channel import channel
from avatar.rpc.client import remote_audio, remote_denoiser, remote_vae
from avatar.rpc.server import serving
from avatar.rpc.wire import RelayedBlock
from avatar.runtime.device_queue import DeviceQueue
from avatar.worker.v1 import audio_pb2, denoiser_pb2, types_pb2, vae_pb2
from benchmarks.standin import content
from benchmarks.standin.content import PUBLIC, Content
from benchmarks.standin.models import AudioModel, DecoderModel, Timed
from benchmarks.standin.service import AudioServicer, DenoiserServicer, Stage, VaeServicer
from benchmarks.standin.step import Step

OPEN = audio_pb2.OpenEncode(session_id="s", encoding="pcm16", rate_hz=content.RATE_HZ, num_channels=1)
AUDIO = [bytes([number + 1]) * PUBLIC.block_bytes() for number in range(3)]


@asynccontextmanager
async def served(kind: Any, *arguments: Any, capacity: int = 1, made: Content = PUBLIC) -> AsyncGenerator[Any, None]:
    """A channel to a stand-in worker whose steps take no time."""
    with DeviceQueue() as queue:
        stage = Stage("stand-in", Step(0.0), queue, capacity, 3, made)
        async with (
            serving("127.0.0.1:0", kind(stage, *arguments)) as port,
            channel(f"127.0.0.1:{port}") as to_worker,
        ):
            yield to_worker


async def items(*given: Any) -> AsyncGenerator[Any, None]:
    for each in given:
        yield each


@pytest.mark.parametrize("encoding", ["fmp4", "rgb24"])
@pytest.mark.parametrize("made", [PUBLIC, Content(block_latents=1, num_levels=2)], ids=["public", "short"])
async def test_a_block_that_passes_all_stages_becomes_the_expected_picture(encoding: str, made: Content) -> None:
    spoken = AUDIO[0][: made.block_bytes()]
    async with served(AudioServicer, made=made) as to_audio:
        audio = remote_audio(to_audio)
        await audio.open(OPEN)
        blocks = [block.to_pb() async for block in audio(items(audio_pb2.AudioPiece(data=spoken)))]
    for level in range(made.num_levels):
        async with served(DenoiserServicer, level, made=made) as to_level:
            stage = remote_denoiser(to_level, level)
            await stage.open(denoiser_pb2.OpenDenoise(session_id="s", level=level))
            answers = [answer.to_pb() async for answer in stage(items(*blocks))]
            assert stage.closed.num_blocks == len(answers) == 1
            blocks[0].latent.CopyFrom(answers[0].latent)
    async with served(VaeServicer, made=made) as to_vae:
        decoder = remote_vae(to_vae)
        await decoder.open(vae_pb2.OpenDecode(session_id="s", encoding=encoding))
        frames = [frame async for frame in decoder(items(*blocks))]
    shown = [(frame.index, frame.num_frames, frame.is_last) for frame in frames]
    if encoding == "fmp4":
        assert shown == [(3, made.block_frames - 3, True)]
        assert content.picture_in(frames[0].data) == made.expected_picture(spoken)
    else:
        last = made.block_frames - 1
        assert shown == [(index, 1, index == last) for index in range(3, last + 1)]
        latent = b"".join(frame.data for frame in frames)
        assert made.expected_picture(spoken).startswith(latent[:: content.PICTURE_STRIDE])


def test_audio_is_cut_into_blocks_and_the_last_is_padded_with_silence() -> None:
    model = AudioModel(Step(0.0), OPEN)
    state = model.open(None)
    blocks = model.step(Timed(audio_pb2.AudioPiece(data=AUDIO[0] + AUDIO[1] + b"\x07" * 8)), state)
    blocks += model.step(Timed(None), state)
    expected = [*AUDIO[:2], b"\x07" * 8 + bytes(PUBLIC.block_bytes() - 8)]
    assert [block.to_pb().features.data for block in blocks] == [PUBLIC.features_of(audio) for audio in expected]
    assert [block.index for block in blocks] == [0, 1, 2]


def test_a_completed_block_does_not_wait_for_the_rest_of_its_audio() -> None:
    model = AudioModel(Step(0.0), OPEN)
    blocks = model.step(Timed(audio_pb2.AudioPiece(data=AUDIO[0][:8], completes=0)), model.open(None))
    assert [block.to_pb().features.data[: PUBLIC.block_bytes()].rstrip(b"\0") for block in blocks] == [AUDIO[0][:8]]


def test_a_rebuilt_stream_reads_past_audio_and_answers_from_the_requested_block() -> None:
    opened = audio_pb2.OpenEncode(rate_hz=content.RATE_HZ, first_block=4, first_answer=6)
    model = AudioModel(Step(0.0), opened)
    blocks = model.step(Timed(audio_pb2.AudioPiece(data=b"".join(AUDIO))), model.open(None))
    assert [(block.index, block.to_pb().features.data) for block in blocks] == [(6, PUBLIC.features_of(AUDIO[2]))]


def test_a_block_out_of_order_is_refused() -> None:
    model = DecoderModel(Step(0.0), vae_pb2.OpenDecode(first_block=5))
    state = model.open(None)
    message = types_pb2.Block(index=5, latent=types_pb2.Tensor(data=bytes(PUBLIC.latent_bytes)))
    block = RelayedBlock.from_bytes(message.SerializeToString())
    model.step(Timed(block), state)
    with pytest.raises(ValueError, match="block 5 came, expected 6"):
        model.step(Timed(block), state)


def test_a_step_never_takes_less_than_its_time() -> None:
    started = time.monotonic()
    assert Step(0.01).run(lambda: "result") == "result"
    assert time.monotonic() - started >= 0.01
