"""Tests of avatar.failover.connector: the worker and the position that a stream is opened at."""

from functools import partial

import pytest

from avatar.errors import NoCapacity, StageLost
from avatar.failover.connector import AudioConnector, ChainConnector, LevelConnector
from avatar.failover.pool import Worker as PoolWorker
from avatar.failover.pool import WorkerPool
from avatar.rpc.channel import channel
from avatar.worker.v1 import audio_pb2 as pb
from avatar.worker.v1.denoiser_pb2 import DenoiseOpened, DenoiserServiceGetInfoResponse, OpenDenoise
from avatar.worker.v1.types_pb2 import Block
from tests.failover.test_pool import get_info, workers
from tests.rpc.conftest import Requests, Responses


def audio_connector(pool: WorkerPool[pb.AudioServiceGetInfoResponse]) -> AudioConnector:
    message = pb.OpenEncode(session_id="a", rate_hz=16000)
    return AudioConnector(pool, message, sample_bytes=2, block_s=0.48, lookahead_s=0.2, statistics=b"0")


async def no_info(_: object) -> DenoiserServiceGetInfoResponse:
    return DenoiserServiceGetInfoResponse()


async def test_a_stream_is_opened_again_at_a_worker_of_the_same_checkpoint_only() -> None:
    async with workers(2) as found:
        for worker, digest in zip(found, "ab", strict=True):
            worker.info = partial(pb.AudioServiceGetInfoResponse, digest=digest, capacity=4)
        pool = WorkerPool("audio", [each.target for each in found], get_info)
        async with pool.running():
            connector = audio_connector(pool)
            first, stream, _ = await connector.connect()
            stream.cancel()
            (again,) = (each for each in found if each.target == first.target)

            async def full(_: Requests, __: object) -> Responses:
                raise NoCapacity("full", retry_s=1.0)
                yield pb.EncodeResponse()

            again.encode = full
            with pytest.raises(NoCapacity):
                await connector.connect()


def test_an_audio_stream_is_opened_from_where_its_replay_begins() -> None:
    connector = audio_connector(WorkerPool("audio", [], get_info))
    connector.accept(pb.EncodeOpened(history_s=0.96))
    for index in range(4):
        connector.replay.accept(Block(index=index, statistics=bytes([index])))
    opening = connector.opening()
    assert (opening.first_block, opening.first_answer, opening.statistics) == (2, 4, b"\3")
    assert opening.session_id == "a"


def test_a_level_is_opened_from_where_its_replay_begins_at_workers_that_serve_it() -> None:
    connector = LevelConnector(WorkerPool("denoiser", [], no_info), OpenDenoise(level=1), "x", next_block=3)
    assert connector.stage == "denoiser-1"
    connector.accept(DenoiseOpened(history_blocks=1))
    for index in (3, 4, 5):
        connector.replay.record(Block(index=index))
    assert connector.replay.accept(Block(index=4)) == 4
    assert connector.opening() == OpenDenoise(level=1, first_block=4)
    infos = [
        DenoiserServiceGetInfoResponse(levels=levels, digest=digest) for levels in ([0], [0, 1]) for digest in "xy"
    ]
    assert [connector.serves(info) for info in infos] == [False, False, True, False]


async def test_a_chain_whose_levels_do_not_all_answer_is_lost() -> None:
    pool = WorkerPool("denoiser", [], no_info)
    connector = ChainConnector(pool, OpenDenoise(), "x", num_levels=2)
    async with channel("127.0.0.1:1") as connection:
        head: PoolWorker[DenoiserServiceGetInfoResponse] = PoolWorker("127.0.0.1:1", connection)
        info = DenoiserServiceGetInfoResponse(levels=[0], chain="c", digest="x")
        head.update(info)
        assert connector.serves(info)
        with pytest.raises(StageLost, match="not all of chain c answer"):
            connector.stream_at(head)
