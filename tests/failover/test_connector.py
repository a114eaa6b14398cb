"""Tests of avatar.failover.connector: the worker that a stream is opened at."""

from functools import partial

import pytest

from avatar.errors import NoCapacity, StageLost
from avatar.failover.connector import audio_connector, chain_connector, level_connector, vae_connector
from avatar.failover.pool import Worker as PoolWorker
from avatar.failover.pool import WorkerPool
from avatar.failover.replay import AudioReplay
from avatar.worker.v1 import audio_pb2 as pb
from avatar.worker.v1.denoiser_pb2 import DenoiserServiceGetInfoResponse, OpenDenoise
from avatar.worker.v1.vae_pb2 import OpenDecode, VaeServiceGetInfoResponse
from tests.failover.test_pool import pooled, workers
from tests.rpc.conftest import Requests, Responses


async def no_info(_: object) -> DenoiserServiceGetInfoResponse:
    return DenoiserServiceGetInfoResponse()


async def test_a_stream_is_opened_again_at_a_worker_of_the_same_checkpoint_only() -> None:
    async with workers(2) as found:
        for worker, digest in zip(found, "ab", strict=True):
            worker.info = partial(pb.AudioServiceGetInfoResponse, digest=digest, capacity=4, block_frames=12)
        async with pooled(*found) as pool:
            connector = audio_connector(pool, pb.OpenEncode(), AudioReplay(2, 16000, 0.48, 0.2, b""), 12)
            first, stream, _ = await connector.connect()
            stream.cancel()
            (again,) = (each for each in found if each.target == first.target)

            async def full(_: Requests, __: object) -> Responses:
                raise NoCapacity("full", retry_s=1.0)
                yield pb.EncodeResponse()

            again.encode = full
            with pytest.raises(NoCapacity):
                await connector.connect()


def test_a_level_is_opened_at_workers_that_serve_it() -> None:
    connector = level_connector(WorkerPool("denoiser", [], no_info), OpenDenoise(level=1), "x")
    assert connector.stage == "denoiser-1"
    infos = [
        DenoiserServiceGetInfoResponse(levels=levels, digest=digest) for levels in ([0], [0, 1]) for digest in "xy"
    ]
    assert [connector.serves(info) for info in infos] == [False, False, True, False]


def test_frames_with_a_label_are_decoded_by_workers_that_draw_it() -> None:
    pool, message = WorkerPool("vae", [], no_info), OpenDecode()
    earlier = VaeServiceGetInfoResponse(block_frames=12)
    present = VaeServiceGetInfoResponse(block_frames=12, labels=True)
    assert [vae_connector(pool, message, 12).serves(info) for info in (earlier, present)] == [True, True]
    labelled = vae_connector(pool, message, 12, has_label=True)
    assert [labelled.serves(info) for info in (earlier, present)] == [False, True]


async def test_a_chain_whose_levels_do_not_all_answer_is_lost() -> None:
    pool = WorkerPool("denoiser", [], no_info)
    connector = chain_connector(pool, OpenDenoise(), "x", num_levels=2)
    head: PoolWorker[DenoiserServiceGetInfoResponse] = PoolWorker("127.0.0.1:1")
    info = DenoiserServiceGetInfoResponse(levels=[0], chain="c", digest="x")
    head.update(info)
    assert connector.serves(info)
    with pytest.raises(StageLost, match="not all of chain c answer"):
        connector.stream_at(head)
