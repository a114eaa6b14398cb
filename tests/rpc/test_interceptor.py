"""Tests of avatar.rpc.interceptor, over a small real worker."""

from __future__ import annotations

import asyncio
import gc
import logging
import secrets
import weakref
from typing import Any

import grpc
import grpc.aio
import pytest
import torch
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from avatar import telemetry
from avatar.errors import REASONS, InvalidAudio, SessionNotFound, StageLost
from avatar.rpc.channel import channel
from avatar.rpc.interceptor import Context, as_invalid_field, receive_open
from avatar.worker.v1 import audio_pb2 as pb
from avatar.worker.v1 import audio_pb2_grpc
from avatar.worker.v1.types_pb2 import Block
from tests.refusals import refused
from tests.rpc.conftest import CLOSE, OPEN, OPENED, WAIT_S, Requests, Responses, Worker, encode, piece


def raising(error: BaseException) -> Responses:
    async def stream() -> Responses:
        yield OPENED
        raise error

    return stream()


@pytest.mark.parametrize("reason", REASONS)
async def test_every_error_arrives_as_its_status_with_its_details(
    worker: Worker, stub: audio_pb2_grpc.AudioServiceAsyncStub, reason: str
) -> None:
    violations = (("a", "too long"), ("b", "too short"))
    error = REASONS[reason]("the disk is full", metadata={"stage": "vae"}, violations=violations, retry_s=1.5)

    def info() -> pb.AudioServiceGetInfoResponse:
        raise error

    worker.info = info
    worker.encode = lambda *_: raising(error)
    async with refused(reason) as in_unary:
        await stub.GetInfo(pb.AudioServiceGetInfoRequest(), timeout=WAIT_S)
    async with refused(reason) as in_stream:
        await encode(stub, [])
    assert in_unary == in_stream
    assert (in_unary.message, in_unary.metadata) == ("the disk is full", {"stage": "vae"})
    assert (in_unary.fields, in_unary.retry_s) == (["a", "b"], 1.5)


async def test_a_text_that_is_too_long_for_a_header_is_cut(
    worker: Worker, stub: audio_pb2_grpc.AudioServiceAsyncStub
) -> None:
    worker.encode = lambda *_: raising(InvalidAudio.at("audio", "x" * 100_000))
    async with refused("INVALID_AUDIO") as refusal:
        await encode(stub, [])
    assert refusal.message.startswith("audio: xxx")
    assert refusal.fields == ["audio"]


async def test_an_unexpected_error_is_internal_and_logged_as_text(
    worker: Worker, stub: audio_pb2_grpc.AudioServiceAsyncStub, caplog: pytest.LogCaptureFixture
) -> None:
    tensors: list[weakref.ref[torch.Tensor]] = []

    async def failing(*_: object) -> Responses:
        yield OPENED
        activations = torch.zeros(3)
        tensors.append(weakref.ref(activations))
        raise RuntimeError("the device is lost")

    worker.encode = failing
    with caplog.at_level(logging.ERROR):
        async with refused("INTERNAL") as refusal:
            await encode(stub, [])
    assert refusal.message == "RuntimeError: the device is lost"
    (record,) = (record for record in caplog.records if record.message == "handler failed")
    assert vars(record)["method"] == "/avatar.worker.v1.AudioService/Encode"
    assert 'raise RuntimeError("the device is lost")' in vars(record)["traceback"]
    gc.collect()
    assert tensors[0]() is None, "the log keeps the traceback's frames alive"


async def test_an_error_of_ours_shows_no_session_id(
    worker: Worker, stub: audio_pb2_grpc.AudioServiceAsyncStub, caplog: pytest.LogCaptureFixture
) -> None:
    session_id = secrets.token_urlsafe(24)
    worker.encode = lambda *_: raising(KeyError(session_id))
    async with refused("INTERNAL") as refusal:
        await encode(stub, [])
    assert session_id not in refusal.message
    assert telemetry.tag(session_id) in refusal.message
    (record,) = (record for record in caplog.records if record.message == "handler failed")
    assert session_id not in str(vars(record))


async def test_an_error_that_is_meant_for_the_client_is_not_logged(
    worker: Worker, stub: audio_pb2_grpc.AudioServiceAsyncStub, caplog: pytest.LogCaptureFixture
) -> None:
    worker.encode = lambda *_: raising(SessionNotFound("gone"))
    async with refused("SESSION_NOT_FOUND"):
        await encode(stub, [])
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_of_several_errors_the_first_that_a_client_can_act_on_is_sent(
    worker: Worker, stub: audio_pb2_grpc.AudioServiceAsyncStub
) -> None:
    async def fail(error: Exception) -> None:
        raise error

    async def grouped(*_: object) -> Responses:
        yield OPENED
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(fail(RuntimeError("follows from it")))
            tasks.create_task(fail(StageLost("vae: gone", metadata={"stage": "vae"})))
            tasks.create_task(fail(SessionNotFound("later")))

    worker.encode = grouped
    async with refused("STAGE_LOST") as refusal:
        await encode(stub, [])
    assert (refusal.message, refusal.metadata) == ("vae: gone", {"stage": "vae"})


async def test_a_generator_is_closed_when_its_call_is_cancelled(
    worker: Worker, stub: audio_pb2_grpc.AudioServiceAsyncStub
) -> None:
    is_closed = asyncio.Event()
    large = pb.EncodeResponse(block=Block(traceparent="x" * 100_000))

    async def endless(*_: object) -> Responses:
        try:
            while True:
                yield large
        finally:
            is_closed.set()

    kept = endless()  # a reference, so that garbage collection does not close it
    worker.encode = lambda *_: kept
    call = stub.Encode(iter([OPEN]))
    await call.read()
    await asyncio.sleep(0.05)  # it fills the flow-control window, and blocks in a write
    assert not is_closed.is_set()
    call.cancel()
    await asyncio.wait_for(is_closed.wait(), WAIT_S)


async def test_a_generator_is_closed_when_its_client_is_gone(worker: Worker) -> None:
    is_closed = asyncio.Event()

    async def waiting(requests: Requests, _: Context) -> Responses:
        try:
            await receive_open(requests)
            yield OPENED
            await receive_open(requests)
        finally:
            is_closed.set()

    worker.encode = waiting
    async with channel(worker.target) as connection:
        call = audio_pb2_grpc.AudioServiceStub(connection).Encode()
        await call.write(OPEN)
        await call.read()
        assert not is_closed.is_set()
    await asyncio.wait_for(is_closed.wait(), WAIT_S)


@pytest.mark.parametrize("method", ["GetInfo", "Encode"])
async def test_bytes_that_are_no_message_are_refused(connection: grpc.aio.Channel, method: str) -> None:
    path = f"/avatar.worker.v1.AudioService/{method}"
    unary: Any = connection.unary_unary(path)
    stream: Any = connection.stream_stream(path)
    async with refused("INVALID_FIELD") as refusal:
        if method == "GetInfo":
            await unary(b"\xff", timeout=WAIT_S)
        else:
            await stream(iter([b"\xff"]), timeout=WAIT_S).read()
    assert refusal.fields == ["request"]


async def test_calls_are_measured_by_method_and_status(
    measured: InMemoryMetricReader, worker: Worker, stub: audio_pb2_grpc.AudioServiceAsyncStub
) -> None:
    worker.encode = lambda *_: raising(SessionNotFound("gone"))
    await stub.GetInfo(pb.AudioServiceGetInfoRequest(), timeout=WAIT_S)
    async with refused("SESSION_NOT_FOUND"):
        await encode(stub, [])
    data = measured.get_metrics_data()
    assert data is not None
    recorded = [
        dict(point.attributes or {})
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.name == "rpc.server.call.duration"
        for point in metric.data.data_points
    ]
    service = "/avatar.worker.v1.AudioService"
    for method, code in ((f"{service}/GetInfo", "OK"), (f"{service}/Encode", "NOT_FOUND")):
        labels = {"rpc.system.name": "grpc", "rpc.method": method, "rpc.response.status_code": code}
        assert labels in recorded


@pytest.mark.parametrize(
    ("requests", "reason", "words"),
    [
        ([], "CONNECTION_LOST", "ended before it was opened"),
        ([CLOSE], "PROTOCOL_ORDER", "began with close, expected open"),
        ([pb.EncodeRequest(piece=piece(0))], "PROTOCOL_ORDER", "began with piece, expected open"),
        ([pb.EncodeRequest()], "PROTOCOL_ORDER", "began with an empty message, expected open"),
        ([OPEN, OPEN], "PROTOCOL_ORDER", "open came on an open stream, expected piece or close"),
        ([OPEN, pb.EncodeRequest()], "PROTOCOL_ORDER", "an empty message came on an open stream"),
        ([OPEN], "CONNECTION_LOST", "ended without close"),
        ([OPEN, pb.EncodeRequest(piece=piece(0))], "CONNECTION_LOST", "ended without close"),
    ],
)
async def test_open_comes_first_and_once_and_close_last(
    stub: audio_pb2_grpc.AudioServiceAsyncStub, requests: list[pb.EncodeRequest], reason: str, words: str
) -> None:
    async with refused(reason) as refusal:
        await encode(stub, requests)
    assert words in refusal.message


async def test_a_stream_that_is_not_opened_in_time_is_ended(
    stub: audio_pb2_grpc.AudioServiceAsyncStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avatar.rpc.interceptor.OPEN_S", 0.1)
    async with refused("PROTOCOL_ORDER") as refusal:
        await stub.Encode().read()
    assert refusal.message == "the stream was not opened within 0.1 s"


def test_an_invalid_field_is_named_and_keeps_its_cause() -> None:
    with (
        pytest.raises(InvalidAudio, match=r"^audio\.data: it is NaN$") as caught,
        as_invalid_field("audio.data", InvalidAudio),
    ):
        raise ValueError("it is NaN")
    assert caught.value.violations == (("audio.data", "it is NaN"),)
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(KeyError), as_invalid_field("audio.data"):
        raise KeyError("ours")
