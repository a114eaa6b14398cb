"""Stand-in workers keep the real contract."""

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from avatar.rpc.channel import channel
from avatar.rpc.client import remote_audio, remote_denoiser, remote_vae
from avatar.rpc.server import serving
from avatar.runtime.device_queue import DeviceQueue
from avatar.worker.v1 import audio_pb2, denoiser_pb2, types_pb2, vae_pb2
from benchmarks.standin import content
from benchmarks.standin.models import Decoding, Due, Hearing
from benchmarks.standin.service import AudioServicer, DenoiserServicer, Stage, VaeServicer
from benchmarks.standin.step import Step

OPEN = audio_pb2.OpenEncode(session_id="s", encoding="pcm16", rate_hz=content.RATE_HZ, num_channels=1)
SOUND = [bytes([number + 1]) * content.SOUND_BYTES for number in range(3)]


@asynccontextmanager
async def served(kind: Any, *arguments: Any, capacity: int = 1) -> AsyncGenerator[Any, None]:
    """A channel to a stand-in that takes no time."""
    with DeviceQueue() as queue:
        stage = Stage("stand-in", Step(0.0), queue, capacity, 3)
        async with (
            serving("127.0.0.1:0", kind(stage, *arguments)) as port,
            channel(f"127.0.0.1:{port}") as to_it,
        ):
            yield to_it


async def items(*given: Any) -> AsyncGenerator[Any, None]:
    for each in given:
        yield each


async def test_a_block_that_passes_all_stages_becomes_the_expected_picture() -> None:
    async with served(AudioServicer) as to_audio:
        hearing = remote_audio(to_audio)
        await hearing.open(OPEN)
        blocks = [block async for block in hearing(items(audio_pb2.AudioPiece(data=SOUND[0])))]
    for level in range(content.NUM_LEVELS):
        async with served(DenoiserServicer, level) as to_level:
            stage = remote_denoiser(to_level, level)
            await stage.open(denoiser_pb2.OpenDenoise(session_id="s", level=level))
            answers = [answer async for answer in stage(items(*blocks))]
            assert stage.closed.num_blocks == len(answers) == 1
            blocks[0].latent.CopyFrom(answers[0].latent)
    async with served(VaeServicer) as to_vae:
        decoding = remote_vae(to_vae)
        await decoding.open(vae_pb2.OpenDecode(session_id="s", encoding="fmp4"))
        frames = [frame async for frame in decoding(items(*blocks))]
    assert [(frame.index, frame.num_frames, frame.is_last) for frame in frames] == [(3, 9, True)]
    assert content.picture_of(frames[0].data) == content.expected(SOUND[0])


def test_sound_is_cut_into_blocks_and_the_last_is_filled_with_silence() -> None:
    hearing = Hearing(Step(0.0), OPEN)
    state = hearing.open(None)
    made = hearing.step(Due(audio_pb2.AudioPiece(data=SOUND[0] + SOUND[1] + b"\x07" * 8)), state)
    made += hearing.step(Due(None), state)
    sounds = [*SOUND[:2], b"\x07" * 8 + bytes(content.SOUND_BYTES - 8)]
    assert [block.features.data for block in made] == [content.heard(sound) for sound in sounds]
    assert [block.index for block in made] == [0, 1, 2]


def test_a_piece_that_completes_a_block_is_answered_at_once() -> None:
    hearing = Hearing(Step(0.0), OPEN)
    made = hearing.step(Due(audio_pb2.AudioPiece(data=SOUND[0][:8], completes=0)), hearing.open(None))
    assert [block.features.data[: content.SOUND_BYTES].rstrip(b"\0") for block in made] == [SOUND[0][:8]]


def test_a_rebuilt_stream_hears_the_past_and_answers_from_where_it_was() -> None:
    again = audio_pb2.OpenEncode(first_block=4, first_answer=6)
    hearing = Hearing(Step(0.0), again)
    made = hearing.step(Due(audio_pb2.AudioPiece(data=b"".join(SOUND))), hearing.open(None))
    assert [(block.index, block.features.data) for block in made] == [(6, content.heard(SOUND[2]))]


def test_a_block_out_of_order_is_refused() -> None:
    decoding = Decoding(Step(0.0), 5)
    state = decoding.open(None)
    latent = types_pb2.Tensor(data=bytes(content.LATENT_BYTES))
    decoding.step(Due(types_pb2.Block(index=5, latent=latent)), state)
    with pytest.raises(ValueError, match="block 5 came, expected 6"):
        decoding.step(Due(types_pb2.Block(index=5, latent=latent)), state)


def test_a_step_never_takes_less_than_its_time() -> None:
    began = time.monotonic()
    assert Step(0.01).take(lambda: "made") == "made"
    assert time.monotonic() - began >= 0.01
