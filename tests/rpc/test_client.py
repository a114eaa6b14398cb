"""Tests of avatar.rpc.client, against a small real worker."""

import asyncio
import gc
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from types import EllipsisType
from typing import Any, TypeAlias

import grpc
import grpc.aio
import pytest

from avatar.errors import (
    AvatarError,
    ConfigMismatch,
    InvalidAudio,
    InvalidField,
    NoCapacity,
    SessionNotFound,
    StageFailed,
    StageLost,
)
from avatar.rpc.channel import channel
from avatar.rpc.client import RemoteStage, remote_audio, remote_denoiser, remote_vae, stage_error
from avatar.rpc.interceptor import Context, receive_open
from avatar.rpc.server import serving
from avatar.rpc.wire import RelayedBlock, serialize_session
from avatar.worker.v1 import audio_pb2 as pb
from avatar.worker.v1 import audio_pb2_grpc, denoiser_pb2, denoiser_pb2_grpc, vae_pb2
from avatar.worker.v1.types_pb2 import Closed, Session, Tensor
from tests.proxy import proxied
from tests.rpc.conftest import OPENED, WAIT_S, Requests, Responses, Source, Worker, block, numbered, piece

Audio: TypeAlias = RemoteStage[pb.AudioPiece, RelayedBlock]
OPEN = pb.OpenEncode(session_id="a")


async def opened(connection: grpc.aio.Channel) -> Audio:
    """Return a stage whose stream is open. Its call starts here, so set the worker's behaviour before."""
    stage = remote_audio(connection)
    assert await stage.open(OPEN) == OPENED.opened
    return stage


async def indexes(blocks: AsyncGenerator[RelayedBlock, None]) -> list[int]:
    return [each.index async for each in blocks]


async def as_pieces(blocks: AsyncGenerator[RelayedBlock, None]) -> AsyncGenerator[pb.AudioPiece, None]:
    async with aclosing(blocks):
        async for each in blocks:
            yield piece(each.index)


async def failing(requests: Requests, context: Context) -> Responses:
    """A worker that fails at block 3."""
    async for response in numbered(requests, context):
        if response.block.index == 3:
            raise RuntimeError("the device is lost")
        yield response


async def test_answers_arrive_in_order_and_closed_reports_their_cost(connection: grpc.aio.Channel) -> None:
    stage = await opened(connection)
    source = Source([7, *range(50)])
    assert await indexes(stage(source.stream())) == [7, *range(50)]
    assert stage.closed == Closed(num_blocks=51, busy_s=0.25)
    assert source.closed.is_set()


async def test_stages_work_at_the_same_time(worker: Worker, connection: grpc.aio.Channel) -> None:
    first_is_at_one = asyncio.Event()

    async def first(requests: Requests, context: Context) -> Responses:
        async for response in numbered(requests, context):
            if response.block.index == 1:
                first_is_at_one.set()
            yield response

    async def second(requests: Requests, context: Context) -> Responses:
        async for response in numbered(requests, context):
            if response.WhichOneof("part") == "block" and response.block.index == 0:
                await asyncio.wait_for(first_is_at_one.wait(), WAIT_S)
            yield response

    blocks: AsyncGenerator[RelayedBlock, None] | None = None
    for behaviour in (first, second):
        worker.encode = behaviour
        stage = await opened(connection)
        blocks = stage(as_pieces(blocks) if blocks else Source(range(3)).stream())
    assert blocks
    assert await indexes(blocks) == [0, 1, 2]


async def test_a_failure_upstream_surfaces_as_itself(connection: grpc.aio.Channel) -> None:
    class MyError(Exception):
        pass

    stage = await opened(connection)
    with pytest.raises(MyError, match="the audio is gone"):
        await indexes(stage(Source([1, 2], MyError("the audio is gone")).stream()))


async def test_a_stages_failure_surfaces_through_those_after_it(worker: Worker, connection: grpc.aio.Channel) -> None:
    source = Source([1, 2, 3, 4], ...)
    pieces = source.stream()
    for name, behaviour in (("audio", numbered), ("denoiser-1", failing), ("denoiser-2", numbered), ("vae", numbered)):
        worker.encode = behaviour
        stage = await opened(connection)
        stage.stage = name
        blocks = stage(pieces)
        pieces = as_pieces(blocks)
    with pytest.raises(StageFailed, match=r"^denoiser-1: RuntimeError: the device is lost$") as caught:
        await indexes(blocks)
    assert caught.value.metadata == {"stage": "denoiser-1"}
    assert source.closed.is_set()


@pytest.mark.parametrize(
    "error",
    [
        InvalidAudio.at("audio.data", "it is NaN"),
        SessionNotFound("gone", metadata={"session": "a"}),
        NoCapacity("full", retry_s=1.5),
        StageLost("lost", metadata={"stage": "vae"}, retry_s=0.25),
    ],
    ids=lambda error: error.reason,
)
async def test_errors_that_a_client_can_act_on_pass_through(
    worker: Worker, connection: grpc.aio.Channel, error: AvatarError
) -> None:
    async def refusing(requests: Requests, _: Context) -> Responses:
        await receive_open(requests)
        raise error
        yield OPENED

    worker.encode = refusing
    with pytest.raises(type(error)) as caught:
        await opened(connection)
    assert type(caught.value) is type(error)
    assert str(caught.value) == f"audio: {error}"
    assert caught.value.metadata == {**error.metadata, "stage": "audio"}
    assert (caught.value.violations, caught.value.retry_s) == (error.violations, error.retry_s)


@pytest.mark.parametrize("is_request", [False, True])
async def test_an_unusable_block_is_not_the_clients_fault(
    worker: Worker, connection: grpc.aio.Channel, is_request: bool
) -> None:
    def info() -> pb.AudioServiceGetInfoResponse:
        raise InvalidField.at("block", "it is NaN")

    worker.info = info
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await audio_pb2_grpc.AudioServiceStub(connection).GetInfo(pb.AudioServiceGetInfoRequest(), timeout=WAIT_S)
    error = stage_error("audio", caught.value, is_request=is_request)
    assert type(error) is (InvalidField if is_request else StageFailed)
    assert error.violations == ((("block", "it is NaN"),) if is_request else ())
    assert str(error) == ("block: it is NaN" if is_request else "audio: block: it is NaN")


@pytest.mark.parametrize("num_unread", [0, 20])  # answers before it, which may be unread yet when a write fails
async def test_a_refusal_arrives_whole_while_more_is_being_written(
    worker: Worker, connection: grpc.aio.Channel, num_unread: int
) -> None:
    async def refusing(requests: Requests, _: Context) -> Responses:
        await receive_open(requests)
        for response in (OPENED, *[block(0)] * num_unread):
            yield response
        raise InvalidAudio.at("audio.data", "it is NaN")

    worker.encode = refusing
    for _ in range(50):
        with pytest.raises(InvalidAudio, match="it is NaN"):
            await indexes((await opened(connection))(Source(range(100)).stream()))


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, StageLost),
        (grpc.StatusCode.CANCELLED, StageLost),
        (grpc.StatusCode.DEADLINE_EXCEEDED, StageLost),
        (grpc.StatusCode.UNIMPLEMENTED, ConfigMismatch),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, StageFailed),
        (grpc.StatusCode.INTERNAL, StageFailed),
        (grpc.StatusCode.INVALID_ARGUMENT, StageFailed),
    ],
)
async def test_a_status_without_details_is_read_by_its_code(
    worker: Worker, connection: grpc.aio.Channel, code: grpc.StatusCode, kind: type[AvatarError]
) -> None:
    async def aborting(requests: Requests, context: Context) -> Responses:
        await receive_open(requests)
        await context.abort(code, "from a proxy")
        yield OPENED

    worker.encode = aborting
    with pytest.raises(AvatarError, match="audio: from a proxy") as caught:
        await opened(connection)
    assert type(caught.value) is kind
    assert caught.value.retry_s == (1.0 if kind is StageLost else None)


async def test_a_worker_of_another_kind_is_a_config_mismatch(connection: grpc.aio.Channel) -> None:
    stage = remote_vae(connection)
    with pytest.raises(ConfigMismatch, match="vae: "):
        await stage.open(vae_pb2.OpenDecode(session_id="a"))


class Level(denoiser_pb2_grpc.DenoiserServiceServicer):
    """A worker of a level that takes the session of a stream, and no block."""

    service_name = "avatar.worker.v1.DenoiserService"

    def __init__(self) -> None:
        self.session = Session()

    def add_to(self, server: grpc.aio.Server) -> None:
        denoiser_pb2_grpc.add_DenoiserServiceServicer_to_server(self, server)

    async def GetInfo(self, _: Any, __: Context) -> denoiser_pb2.DenoiserServiceGetInfoResponse:  # noqa: N802
        return denoiser_pb2.DenoiserServiceGetInfoResponse()

    async def Denoise(self, requests: AsyncIterator[Any], _: Context) -> AsyncGenerator[Any, None]:  # noqa: N802
        self.session = (await receive_open(requests)).session
        yield denoiser_pb2.DenoiseResponse(opened=denoiser_pb2.DenoiseOpened())


async def test_a_stream_is_opened_with_the_latents_of_the_largest_pictures() -> None:
    """At 1280x704, in float32."""
    motion = Tensor(dtype="float32", shape=[16, 19, 88, 160], data=bytes(16 * 19 * 88 * 160 * 4))
    carried = serialize_session(denoiser_pb2.OpenDenoise, Session(id="a"), motion.SerializeToString())
    level = Level()
    async with serving("127.0.0.1:0", level) as port, channel(f"127.0.0.1:{port}") as connection:
        await remote_denoiser(connection, 0).open(denoiser_pb2.OpenDenoise(), carried)
    assert level.session == Session(id="a", motion=motion)


async def test_a_missing_worker_is_lost() -> None:
    async with channel("127.0.0.1:1") as connection:
        with pytest.raises(StageLost, match="audio: ") as caught:
            await opened(connection)
    assert caught.value.metadata == {"stage": "audio"}
    assert caught.value.retry_s


async def test_a_worker_that_never_opens_a_stream_is_lost_in_time(
    worker: Worker, connection: grpc.aio.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled = asyncio.Event()

    async def silent(*_: object) -> Responses:
        try:
            await asyncio.Event().wait()
            yield OPENED
        finally:
            cancelled.set()

    worker.encode = silent
    monkeypatch.setattr("avatar.rpc.client.OPEN_S", 0.1)
    with pytest.raises(StageLost, match=r"audio did not open a stream in 0\.1 s") as caught:
        await opened(connection)
    assert caught.value.metadata == {"stage": "audio"}
    await asyncio.wait_for(cancelled.wait(), WAIT_S)


async def test_opening_can_be_cancelled_at_any_time(worker: Worker, connection: grpc.aio.Channel) -> None:
    """Reads of grpc.aio swallow one cancellation in a hundred while a call starts."""

    async def refusing(requests: Requests, _: Context) -> Responses:
        await receive_open(requests)
        raise NoCapacity("full")
        yield

    worker.encode = refusing
    for number in range(400):
        opening = asyncio.create_task(opened(connection))
        for _ in range(number % 60):
            await asyncio.sleep(0)
        is_cancelled = opening.cancel()
        await asyncio.wait({opening})
        assert opening.cancelled() == is_cancelled
        if not is_cancelled:
            assert isinstance(opening.exception(), NoCapacity)


@pytest.mark.parametrize("num_blocks", [0, 1])
@pytest.mark.parametrize("is_writing", [False, True], ids=["idle", "written to"])
async def test_a_stream_that_ends_without_closed_is_lost(
    worker: Worker, connection: grpc.aio.Channel, num_blocks: int, is_writing: bool
) -> None:
    async def ending(requests: Requests, _: Context) -> Responses:
        await receive_open(requests)
        for response in (OPENED, *[block(0)] * num_blocks):
            yield response

    worker.encode = ending
    stage = await opened(connection)
    source = Source(range(1000) if is_writing else [], ...)
    with pytest.raises(StageLost, match="audio: the stream ended before all was answered") as caught:
        await indexes(stage(source.stream()))
    assert caught.value.metadata == {"stage": "audio"}
    assert source.closed.is_set()


async def test_a_stream_that_ends_before_it_is_opened_is_lost(worker: Worker, connection: grpc.aio.Channel) -> None:
    async def nothing(requests: Requests, _: Context) -> Responses:
        await receive_open(requests)
        return
        yield OPENED

    worker.encode = nothing
    with pytest.raises(StageLost, match="audio: the stream ended before all was answered"):
        await opened(connection)


async def test_a_worker_that_is_killed_is_lost(worker: Worker) -> None:
    async with proxied(worker.target) as proxy, channel(proxy.target) as connection:
        source = Source([5], ...)
        blocks = (await opened(connection))(source.stream())
        assert (await anext(blocks)).index == 5
        proxy.cut()
        with pytest.raises(StageLost, match="audio: ") as caught:
            await anext(blocks)
        assert caught.value.metadata == {"stage": "audio"}
        assert source.closed.is_set()


@pytest.mark.parametrize("end", [None, ...], ids=["all was sent", "more may come"])
async def test_closing_the_generator_cancels_the_call_and_closes_the_items(
    worker: Worker, connection: grpc.aio.Channel, end: EllipsisType | None
) -> None:
    is_ended = asyncio.Event()

    async def slow(requests: Requests, context: Context) -> Responses:
        try:
            async for response in numbered(requests, context):
                yield response
                if response.block.index == 1:
                    await asyncio.Event().wait()
        finally:
            is_ended.set()

    worker.encode = slow
    source = Source([1], end)
    blocks = (await opened(connection))(source.stream())
    assert (await anext(blocks)).index == 1
    await asyncio.sleep(0.05)  # until everything is sent
    assert source.closed.is_set() == (end is None)
    assert not is_ended.is_set()
    await blocks.aclose()
    assert source.closed.is_set()
    await asyncio.wait_for(is_ended.wait(), WAIT_S)


async def test_cancelling_the_reader_is_a_cancellation_and_closes_the_items(connection: grpc.aio.Channel) -> None:
    source = Source([], ...)
    reading = asyncio.ensure_future(indexes((await opened(connection))(source.stream())))
    await asyncio.sleep(0.01)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert source.closed.is_set()


async def test_cancelling_the_reader_as_the_items_fail_is_a_cancellation(connection: grpc.aio.Channel) -> None:
    failing = asyncio.Event()

    async def items() -> AsyncGenerator[pb.AudioPiece, None]:
        await failing.wait()
        raise StageLost("another stage")
        yield pb.AudioPiece()

    reading = asyncio.ensure_future(indexes((await opened(connection))(items())))
    await asyncio.sleep(0.01)
    failing.set()
    await asyncio.sleep(0)  # the items have failed, and the reader has not noticed yet
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading


async def test_cancelling_a_stage_that_has_ended_does_nothing(connection: grpc.aio.Channel) -> None:
    stage = await opened(connection)
    assert await indexes(stage(Source([1]).stream())) == [1]
    stage.cancel()
    assert stage.closed.num_blocks == 1


async def test_a_failure_leaves_no_exception_unretrieved(
    worker: Worker, connection: grpc.aio.Channel, caplog: pytest.LogCaptureFixture
) -> None:
    worker.encode = failing
    with pytest.raises(StageFailed):
        await indexes((await opened(connection))(Source(range(100)).stream()))
    gc.collect()
    await asyncio.sleep(0)
    assert not [record for record in caplog.records if "never retrieved" in record.message]
