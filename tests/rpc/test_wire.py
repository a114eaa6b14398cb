from typing import Any

import pytest
from google.protobuf.message import DecodeError

from avatar.rpc.wire import LATENT, RelayedBlock, parse_response, serialize_field, serialize_session
from avatar.worker.v1 import denoiser_pb2, vae_pb2
from avatar.worker.v1.types_pb2 import Block, Session, Tensor


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
    parsed = parse_response(response.SerializeToString(), 2, denoiser_pb2.DenoiseResponse)
    assert isinstance(parsed, RelayedBlock)
    assert parsed.head == Block(index=300, conditions=2, statistics=b"12", slack_s=-1.5)
    assert parsed.latent == [b"".join(serialize_field(LATENT, block.latent))]
    assert parsed.to_pb() == block
    empty = parse_response(denoiser_pb2.DenoiseResponse(block=Block()).SerializeToString(), 2, type(response))
    assert isinstance(empty, RelayedBlock)
    assert empty.index == 0


def test_another_response_is_parsed_whole() -> None:
    response = denoiser_pb2.DenoiseResponse(opened=denoiser_pb2.DenoiseOpened(history_blocks=3))
    assert parse_response(response.SerializeToString(), 2, denoiser_pb2.DenoiseResponse) == response


def test_bytes_that_are_no_block_are_refused() -> None:
    data = denoiser_pb2.DenoiseResponse(block=Block(index=300, latent=tensor(300, 2))).SerializeToString()
    for damaged in (
        data[:1],
        data[:-1],
        data + b"\0",
        b"\x12\x02\x07\x00",
        b"\x12\x02\x80\x80",
        b"\x12" + b"\xff" * 11,
    ):
        with pytest.raises(DecodeError):
            parse_response(damaged, 2, denoiser_pb2.DenoiseResponse)
