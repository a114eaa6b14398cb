"""Tests of services.vae.service: the encodings of frames, over real gRPC."""

import asyncio
import io
import sys
import threading
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import av
import grpc
import grpc.aio
import numpy as np
import pytest
import torch

from avatar.errors import StageFailed
from avatar.rpc.channel import channel
from avatar.rpc.client import remote_vae
from avatar.rpc.codec import tensor_to_pb
from avatar.rpc.server import serving
from avatar.rpc.wire import LATENT, RelayedBlock
from avatar.runtime.device_queue import DeviceQueue
from avatar.settings import VaeSettings
from avatar.types import FrameChunk, LatentFrame
from avatar.vae.encodings import ENCODINGS, encode, init_segment
from avatar.vae.picture import reading
from avatar.vae.vae import Vae, VaeState
from avatar.worker.v1 import types_pb2 as types
from avatar.worker.v1 import vae_pb2 as pb
from avatar.worker.v1 import vae_pb2_grpc
from services.vae import service
from services.vae.__main__ import build
from services.vae.service import VaeServicer
from tests.busy import WAIT_S
from tests.refusals import refused
from tests.vae.conftest import CODECS, SIZE, config_of
from tests.vae.conftest import blocks as random_blocks
from tests.vae.conftest import session as random_session

SESSION = types.Session(id="s", width=64, height=64, motion=tensor_to_pb(torch.zeros(16, 19, 8, 8)))
LABELLED = types.Session(label=True)
LABELLED.MergeFrom(SESSION)
NUM_BLOCKS = 3


@pytest.fixture
async def worker(checkpoint: Path) -> AsyncGenerator[grpc.aio.Channel, None]:
    """A channel to a VAE worker."""
    with DeviceQueue() as queue:
        servicer = build(VaeSettings(checkpoint=checkpoint, capacity=2), queue)
        async with serving("127.0.0.1:0", servicer) as port, channel(f"127.0.0.1:{port}") as target:
            yield target


async def blocks(first: int = 0) -> AsyncGenerator[types.Block, None]:
    for index in range(first, NUM_BLOCKS):
        latent = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(index))
        yield types.Block(index=index, latent=tensor_to_pb(latent))


async def frames_in(
    target: grpc.aio.Channel,
    encoding: str,
    first: int = 0,
    *,
    per_latent: bool = False,
    session: types.Session = SESSION,
) -> tuple[bytes, list[types.Frame]]:
    stage = remote_vae(target)
    opened = await stage.open(
        pb.OpenDecode(session=session, encoding=encoding, first_block=first, per_latent=per_latent)
    )
    return opened.init_segment, [frame async for frame in stage(blocks(first))]


async def test_a_block_whose_tensor_is_damaged_is_refused_and_the_worker_serves_on(worker: grpc.aio.Channel) -> None:
    async def damaged() -> AsyncGenerator[RelayedBlock, None]:
        yield RelayedBlock(types.Block(), latent=[bytes([LATENT << 3 | 2, 2]), b"\x1a\x05"])  # data of 5 bytes, cut off

    stage = remote_vae(worker)
    await stage.open(pb.OpenDecode(session=SESSION, encoding="jpeg"))
    with pytest.raises(StageFailed, match="block: the bytes of latent are not a tensor"):
        await anext(stage(damaged()))
    _, frames = await frames_in(worker, "jpeg")
    assert frames


async def opened_in(target: grpc.aio.Channel, encoding: str) -> pb.DecodeOpened:
    stage = remote_vae(target)
    opened: pb.DecodeOpened = await stage.open(pb.OpenDecode(session=SESSION, encoding=encoding))
    stage.cancel()
    return opened


def block_of(frames: list[types.Frame], index: int) -> list[types.Frame]:
    return [frame for frame in frames if frame.block == index]


@pytest.mark.parametrize("encoding", ENCODINGS)
async def test_frames_are_encoded_block_by_block(worker: grpc.aio.Channel, encoding: str) -> None:
    _, raw = await frames_in(worker, "")
    init, frames = await frames_in(worker, encoding)
    assert init == init_segment(encoding, 64, 64, 25)
    for index in range(NUM_BLOCKS):
        expected, encoded = block_of(raw, index), block_of(frames, index)
        pixels = np.stack([np.frombuffer(frame.data, np.uint8).reshape(64, 64, 3) for frame in expected])
        assert [frame.data for frame in encoded] == [
            each.data for each in encode(pixels, encoding, 25, 0, encoded[0].index)
        ]
        assert [frame.is_last for frame in encoded] == [False] * (len(encoded) - 1) + [True]
        assert encoded[0].index == expected[0].index
        assert sum(frame.num_frames for frame in encoded) == len(expected) == (9 if index == 0 else 12)


@pytest.mark.parametrize("encoding", ENCODINGS)
async def test_frames_are_encoded_latent_by_latent_on_request(worker: grpc.aio.Channel, encoding: str) -> None:
    _, raw = await frames_in(worker, "")
    _, frames = await frames_in(worker, encoding, per_latent=True)
    pixels = {frame.index: np.frombuffer(frame.data, np.uint8).reshape(64, 64, 3) for frame in raw}
    expected = []
    for first in (3, *range(4, 12 * NUM_BLOCKS, 4)):
        group = np.stack([pixels[index] for index in range(first, 4 if first == 3 else first + 4)])
        expected += [(each.data, each.is_key, each.num_frames) for each in encode(group, encoding, 25, 0, first)]
    assert [(frame.data, frame.is_key, frame.num_frames) for frame in frames] == expected
    assert [frame.index + frame.num_frames for frame in frames if frame.is_last] == [12, 24, 36]


class StepwiseVae(Vae[Any]):
    """A VAE that decodes a latent frame only when it may."""

    may_decode: threading.Semaphore

    def step(self, latent: LatentFrame, state: VaeState[Any]) -> FrameChunk:
        assert self.may_decode.acquire(timeout=WAIT_S), "the frames before this latent frame have not left"
        return super().step(latent, state)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("encoding", ENCODINGS)
async def test_frames_leave_before_the_next_latent_frame_is_decoded(codec: str, encoding: str) -> None:
    vae = StepwiseVae(CODECS[codec](), config_of(codec))
    vae.may_decode = threading.Semaphore(1)
    motion = tensor_to_pb(random_session().motion)
    session = types.Session(id="s", width=SIZE[0], height=SIZE[1], motion=motion)

    async def items() -> AsyncGenerator[types.Block, None]:
        for block in random_blocks(2):
            assert block.latent is not None
            yield types.Block(index=block.index, latent=tensor_to_pb(block.latent))

    frames = []
    with DeviceQueue() as queue:
        async with (
            serving("127.0.0.1:0", VaeServicer(vae, "digest", queue, 1)) as port,
            channel(f"127.0.0.1:{port}") as target,
        ):
            stage = remote_vae(target)
            await stage.open(pb.OpenDecode(session=session, encoding=encoding, per_latent=True))
            async for frame in stage(items()):
                frames.append(frame)
                if frame.index + frame.num_frames in range(4, 25, 4):  # the last of its latent frame
                    vae.may_decode.release()
    assert sum(frame.num_frames for frame in frames) == 21
    if encoding == "rgb24":  # byte for byte what one process makes
        alone: Vae[Any] = Vae(CODECS[codec](), config_of(codec))
        state = alone.open(random_session())
        chunks = [chunk for block in random_blocks(2) for chunk in alone.decode(block, state)]
        assert b"".join(frame.data for frame in frames) == b"".join(chunk.frames.numpy().tobytes() for chunk in chunks)


@pytest.mark.parametrize("encoding", ENCODINGS)
async def test_a_rebuilt_stream_gives_the_same_bytes(worker: grpc.aio.Channel, encoding: str) -> None:
    last, history = NUM_BLOCKS - 1, (await opened_in(worker, encoding)).history_blocks
    assert history < last  # the rebuilt stream starts later than the whole one
    init, whole = await frames_in(worker, encoding, session=LABELLED)
    again, rebuilt = await frames_in(worker, encoding, first=last - history, session=LABELLED)
    assert again == init
    assert block_of(rebuilt, last) == block_of(whole, last)


async def test_fragments_can_be_played_from_any_block(worker: grpc.aio.Channel) -> None:
    init, frames = await frames_in(worker, "fmp4")
    with av.open(io.BytesIO(init + b"".join(frame.data for frame in frames[1:])), "r") as video:
        times = [round(float(frame.time or 0) * 25) for frame in video.decode(video=0)]
    assert times == list(range(frames[1].index, frames[1].index + 12 * (NUM_BLOCKS - 1)))


async def test_interleaved_equals_alone(worker: grpc.aio.Channel) -> None:
    alone = [await frames_in(worker, encoding) for encoding in ("jpeg", "rgb24")]
    interleaved = await asyncio.gather(frames_in(worker, "jpeg"), frames_in(worker, "rgb24"))
    assert list(interleaved) == alone


@pytest.mark.parametrize(("encoding", "max_bytes"), [("jpeg", 1_000_000), ("rgb24", 1_000_000), ("rgb24", 100)])
async def test_frames_that_are_ready_together_share_messages_of_bounded_size(
    worker: grpc.aio.Channel, monkeypatch: pytest.MonkeyPatch, encoding: str, max_bytes: int
) -> None:
    monkeypatch.setattr(service, "MAX_CHUNK_BYTES", max_bytes)
    _, alone = await frames_in(worker, encoding)
    call = vae_pb2_grpc.VaeServiceStub(worker).Decode()
    await call.write(pb.DecodeRequest(open=pb.OpenDecode(session=SESSION, encoding=encoding, takes_chunks=True)))
    async for block in blocks():
        await call.write(pb.DecodeRequest(block=block))
    await call.write(pb.DecodeRequest(close=pb.CloseDecode()))
    chunks = [list(response.chunk.frames) async for response in call if response.WhichOneof("part") == "chunk"]
    assert [[frame.is_followed for frame in chunk] for chunk in chunks] == [
        [True] * (len(chunk) - 1) + [False] for chunk in chunks
    ]
    for frame in (frame for chunk in chunks for frame in chunk):
        frame.ClearField("is_followed")
    assert [frame for chunk in chunks for frame in chunk] == alone
    assert all(len({frame.block for frame in chunk}) == 1 for chunk in chunks)
    sizes = [sum(len(frame.data) for frame in chunk) for chunk in chunks]
    assert len(chunks) == len(alone) if max_bytes == 100 else len(chunks) < len(alone)
    assert all(size <= max_bytes or len(chunk) == 1 for size, chunk in zip(sizes, chunks, strict=True))


async def test_frames_arrive_one_by_one_or_together_alike(worker: grpc.aio.Channel) -> None:
    _, alone = await frames_in(worker, "jpeg")
    stage = remote_vae(worker)
    await stage.open(pb.OpenDecode(session=SESSION, encoding="jpeg", takes_chunks=True))
    together = [frame async for frame in stage(blocks())]
    assert any(frame.is_followed for frame in together)
    for frame in together:
        frame.ClearField("is_followed")
    assert together == alone


async def test_info_lists_the_encodings(worker: grpc.aio.Channel) -> None:
    info = await vae_pb2_grpc.VaeServiceStub(worker).GetInfo(pb.VaeServiceGetInfoRequest())
    assert list(info.encodings) == ["rgb24", "jpeg", "h264", "fmp4"]
    assert info.active == 0


@pytest.mark.parametrize(
    ("opening", "field"),
    [
        (pb.OpenDecode(session=SESSION, encoding="gif"), "open.encoding"),
        (pb.OpenDecode(session=SESSION, encoding="jpeg", quality=101), "open.quality"),
        (pb.OpenDecode(session_id="s"), "open.session"),
    ],
    ids=["encoding", "quality", "no session"],
)
async def test_an_opening_that_cannot_be_used_is_refused(
    worker: grpc.aio.Channel, opening: pb.OpenDecode, field: str
) -> None:
    async with refused("INVALID_FIELD") as refusal:
        call = vae_pb2_grpc.VaeServiceStub(worker).Decode()
        await call.write(pb.DecodeRequest(open=opening))
        await call.read()
    assert refusal.fields == [field]


async def test_a_machine_too_busy_for_a_picture_has_no_capacity_for_it(
    worker: grpc.aio.Channel, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PROGRAM", (sys.executable, "-c", "import time; time.sleep(60)"))
    monkeypatch.setattr(reading, "TIME_S", 0.1)
    monkeypatch.setattr(reading, "LONGEST_S", 0.2)
    async with refused("NO_CAPACITY"):
        await vae_pb2_grpc.VaeServiceStub(worker).EncodeReference(pb.EncodeReferenceRequest(picture=picture))


async def test_closing_a_stream_while_it_encodes_frees_its_capacity(worker: grpc.aio.Channel) -> None:
    stage = remote_vae(worker)
    await stage.open(pb.OpenDecode(session=SESSION, encoding="h264"))
    frames = stage(blocks())
    await anext(frames)
    await frames.aclose()
    stub = vae_pb2_grpc.VaeServiceStub(worker)
    async with asyncio.timeout(5):
        while (await stub.GetInfo(pb.VaeServiceGetInfoRequest())).active:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
