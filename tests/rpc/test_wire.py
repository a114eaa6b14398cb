from collections.abc import AsyncGenerator
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.message import DecodeError

from avatar.errors import StageFailed
from avatar.rpc.channel import channel
from avatar.rpc.client import remote_audio
from avatar.rpc.wire import (
    LATENT,
    RelayedBlock,
    parse_part,
    serialize_field,
    serialize_part,
    serialize_session,
)
from avatar.worker.v1 import audio_pb2, denoiser_pb2, vae_pb2
from avatar.worker.v1.types_pb2 import Block, Session, Tensor
from tests.rpc.conftest import OPENED, Source

RESPONSE = denoiser_pb2.DenoiseResponse
BLOCK = RESPONSE.DESCRIPTOR.fields_by_name["block"]


def tensor(num_bytes: int, value: int) -> Tensor:
    return Tensor(dtype="uint8", shape=[num_bytes], data=bytes([value]) * num_bytes)


def test_an_assembled_request_equals_the_message() -> None:
    for num_bytes in (0, 1, 127, 128, 70_000):
        given = Block(index=300, features=tensor(num_bytes, 1), conditions=2, traceparent="00-1", slack_s=-0.5)
        given.heard.CopyFrom(tensor(num_bytes, 3))
        given.face_motion.CopyFrom(tensor(num_bytes, 4))
        whole = denoiser_pb2.DenoiseRequest(block=given)
        relayed = RelayedBlock.from_bytes(given.SerializeToString())
        assert denoiser_pb2.DenoiseRequest.FromString(b"".join(serialize_field(2, relayed))) == whole
        with_latent = relayed.with_latent(serialize_field(LATENT, tensor(num_bytes, 2)))
        whole.block.latent.CopyFrom(tensor(num_bytes, 2))
        assert denoiser_pb2.DenoiseRequest.FromString(b"".join(serialize_field(2, with_latent))) == whole


@pytest.mark.parametrize("opened", [denoiser_pb2.OpenDenoise, vae_pb2.OpenDecode])
def test_a_stream_is_opened_with_the_session_but_its_prompt_and_tenant(opened: type[Any]) -> None:
    session = Session(id="a", seed=7, width=64, min_sink_distance=0, prompt="private", tenant="acme")
    motion = tensor(70_000, 1)
    carried = serialize_session(opened, session, motion.SerializeToString())
    request = b"".join(serialize_field(1, opened(session_id="a", is_live=True), carried))
    expected = opened(session_id="a", is_live=True)
    expected.session.MergeFrom(Session(id="a", seed=7, width=64, min_sink_distance=0, motion=motion))
    kind = denoiser_pb2.DenoiseRequest if opened is denoiser_pb2.OpenDenoise else vae_pb2.DecodeRequest
    assert kind.FromString(request) == kind(open=expected)


def test_inputs_leave_the_head_and_those_that_are_not_given_are_not_sent() -> None:
    relayed = RelayedBlock.from_bytes(Block(index=1, features=tensor(9, 1), heard=tensor(9, 2)).SerializeToString())
    assert relayed.head == Block(index=1)
    arrived = Block.FromString(b"".join(relayed.parts()))
    assert arrived.heard == tensor(9, 2)
    assert not arrived.HasField("face_motion")


def test_a_moved_reference_is_passed_on_with_the_latent() -> None:
    sent = RelayedBlock.from_bytes(Block(index=1, features=tensor(9, 1)).SerializeToString())
    answer = RelayedBlock.from_bytes(Block(index=1, latent=tensor(9, 2), moved=tensor(9, 3)).SerializeToString())
    request = Block.FromString(b"".join(sent.with_latent(answer.latent).parts()))
    assert (request.features, request.latent, request.moved) == (tensor(9, 1), tensor(9, 2), tensor(9, 3))


def test_a_block_that_was_sent_does_not_change_afterwards() -> None:
    first = RelayedBlock.from_bytes(Block(index=1, features=tensor(9, 1)).SerializeToString())
    second = first.with_latent(serialize_field(LATENT, tensor(9, 2)))
    second.head.slack_s = 1.0
    third = second.with_latent(serialize_field(LATENT, tensor(9, 3)))
    assert Block.FromString(b"".join(first.parts())) == Block(index=1, features=tensor(9, 1))
    assert Block.FromString(b"".join(second.parts())).latent == tensor(9, 2)
    assert Block.FromString(b"".join(third.parts())).latent == tensor(9, 3)


def test_a_deadline_is_sent_as_the_time_that_remains_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([99.0, 101.5])
    monkeypatch.setattr("avatar.rpc.wire.time.monotonic", lambda: next(clock))
    block = RelayedBlock(Block(index=1), due_s=100.0)
    sent = [Block.FromString(b"".join(block.parts())).slack_s for _ in range(2)]
    assert sent == [1.0, -1.5], "a block that is sent again later has less time"


def test_a_message_is_serialized_unchanged() -> None:
    request = denoiser_pb2.DenoiseRequest(open=denoiser_pb2.OpenDenoise(session_id="a"))
    assert denoiser_pb2.DenoiseRequest.FromString(b"".join(serialize_field(1, request.open))) == request


def test_a_block_in_a_response_keeps_its_tensors_serialized() -> None:
    block = Block(
        index=300, features=tensor(70_000, 1), latent=tensor(9, 2), conditions=2, statistics=b"12", slack_s=-1.5
    )
    response = denoiser_pb2.DenoiseResponse(block=block)
    parsed = parse_part(response.SerializeToString(), RESPONSE, BLOCK)
    assert isinstance(parsed, RelayedBlock)
    assert parsed.head == Block(index=300, conditions=2, statistics=b"12", slack_s=-1.5)
    assert parsed.latent == [b"".join(serialize_field(LATENT, block.latent))]
    assert parsed.to_pb() == block
    assert RESPONSE.FromString(serialize_part(parsed, BLOCK)) == response
    empty = parse_part(RESPONSE(block=Block()).SerializeToString(), RESPONSE, BLOCK)
    assert isinstance(empty, RelayedBlock)
    assert empty.index == 0


def test_the_elements_of_a_tensor_are_a_slice_of_the_bytes_that_arrived() -> None:
    data = RESPONSE(block=Block(index=1, features=tensor(300, 1), latent=tensor(0, 0))).SerializeToString()
    parsed = parse_part(data, RESPONSE, BLOCK)
    assert isinstance(parsed, RelayedBlock)
    found = parsed.tensor("features")
    assert found
    head, elements = found
    assert (head.dtype, list(head.shape), bytes(elements)) == ("uint8", [300], b"\1" * 300)
    assert isinstance(elements, memoryview)
    assert elements.obj is data
    assert parsed.tensor("latent") == (tensor(0, 0), b"")
    assert parsed.tensor("heard") is None


def test_a_tensor_that_comes_in_two_parts_is_their_merger() -> None:
    parts = [Tensor(dtype="float32", shape=[2], data=b"1"), Tensor(dtype="uint8", shape=[3], data=b"23")]
    block = RelayedBlock.from_bytes(b"".join(part for each in parts for part in serialize_field(LATENT, each)))
    assert block.tensor("latent") == (Tensor(dtype="uint8", shape=[2, 3]), b"23")
    assert block.to_pb().latent == Tensor(dtype="uint8", shape=[2, 3], data=b"23")


@pytest.mark.parametrize("content", [b"\x0a", b"\x1a\x05abc", b"\x18\x01", b"\x0a\x01\xff", b"\x0f"])
def test_bytes_that_are_no_tensor_are_refused_by_name(content: bytes) -> None:
    block = RelayedBlock.from_bytes(bytes([LATENT << 3 | 2, len(content)]) + content)
    with pytest.raises(ValueError, match="the bytes of latent are not a tensor"):
        block.tensor("latent")


def test_another_response_is_parsed_whole() -> None:
    response = RESPONSE(opened=denoiser_pb2.DenoiseOpened(history_blocks=3))
    assert parse_part(response.SerializeToString(), RESPONSE, BLOCK) == response
    assert RESPONSE.FromString(serialize_part(response, BLOCK)) == response


def test_a_block_with_fields_of_a_newer_version_beside_it_is_found() -> None:
    unknown = b"\xa2\x06\x01a"  # field 100, bytes
    block = RESPONSE(block=Block(index=300, latent=tensor(9, 2))).SerializeToString()
    for data in (block + unknown, unknown + block):
        parsed = parse_part(data, RESPONSE, BLOCK)
        assert isinstance(parsed, RelayedBlock)
        assert parsed.to_pb() == Block(index=300, latent=tensor(9, 2))


def test_bytes_that_are_no_block_are_refused() -> None:
    data = RESPONSE(block=Block(index=300, latent=tensor(300, 2))).SerializeToString()
    for damaged in (
        data[:1],
        data[:-1],
        data + b"\0",
        b"\x12\x02\x07\x00",
        b"\x12\x02\x80\x80",
        b"\x12" + b"\xff" * 11,
    ):
        with pytest.raises(DecodeError):
            parse_part(damaged, RESPONSE, BLOCK)


@pytest.mark.parametrize("answers", [[], [OPENED.SerializeToString()]], ids=["opened", "block"])
async def test_an_answer_that_cannot_be_parsed_is_a_failure_of_its_stage(answers: list[bytes]) -> None:
    async def encode(_: Any, __: Any) -> AsyncGenerator[bytes, None]:
        for answer in [*answers, b"\xff\xff"]:
            yield answer

    async def first_block() -> None:
        async with channel(f"127.0.0.1:{port}") as connection:
            stage = remote_audio(connection)
            await stage.open(audio_pb2.OpenEncode(session_id="a"))
            await anext(stage(Source([], ...).stream()))

    service = audio_pb2.DESCRIPTOR.services_by_name["AudioService"].full_name
    handlers: dict[str, Any] = {"Encode": grpc.stream_stream_rpc_method_handler(encode)}
    server = grpc.aio.server()
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        with pytest.raises(StageFailed, match="audio answered with bytes that are no message") as caught:
            await first_block()
        assert caught.value.metadata == {"stage": "audio"}
    finally:
        await server.stop(None)
