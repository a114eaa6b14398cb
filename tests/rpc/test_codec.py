"""Tests of avatar.rpc.codec."""

import struct
from dataclasses import replace
from types import SimpleNamespace
from typing import TypeVar

import pytest
import torch
from google.protobuf.message import Message
from torch import Tensor

from avatar.rpc.codec import (
    DTYPES,
    audio_session_from_pb,
    block_from_wire,
    block_to_wire,
    conditions_from_pb,
    conditions_to_pb,
    due_s,
    latent_to_wire,
    on_host,
    piece_from_bytes,
    session_from_pb,
    tensor_from_pb,
    tensor_to_pb,
)
from avatar.rpc.wire import RelayedBlock
from avatar.store.packing import ITEM_BYTES
from avatar.types import Block, Conditions
from avatar.worker.v1 import types_pb2 as pb
from avatar.worker.v1.audio_pb2 import AudioPiece, OpenEncode
from tests.standin_gpu import placed, stand_in_gpu

Sent = TypeVar("Sent", bound=Message)
SHAPES = [(), (1,), (0,), (3, 0, 2), (2, 3, 4, 5)]


def sent(message: Sent) -> Sent:
    """Return the message as it arrives."""
    return type(message).FromString(message.SerializeToString())


def arrived_as(block: RelayedBlock) -> RelayedBlock:
    """Return the block as it arrives."""
    return RelayedBlock.from_bytes(b"".join(block.parts()))


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator) * 100).to(dtype)


def assert_same(actual: Tensor | None, expected: Tensor | None) -> None:
    """Assert the same dtype, shape and bytes: -0 differs from 0, and one NaN from another."""
    assert actual is not None
    assert expected is not None
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert bytes_of(actual) == bytes_of(expected)


def bytes_of(x: Tensor) -> bytes:
    return bytes(x.detach().clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8).tolist())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_a_tensor_arrives_byte_for_byte(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = randn(*shape, dtype=dtype)
    assert_same(tensor_from_pb(sent(tensor_to_pb(x))), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_special_numbers_arrive_byte_for_byte(dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), -float("nan")]).to(dtype)
    tiny = torch.full((1,), torch.finfo(dtype).smallest_normal, dtype=dtype) / 2
    assert_same(tensor_from_pb(sent(tensor_to_pb(torch.cat([x, tiny])))), torch.cat([x, tiny]))


def test_the_store_accepts_the_same_dtypes() -> None:
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == ITEM_BYTES


def test_numbers_are_little_endian_and_row_major() -> None:
    message = tensor_to_pb(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    assert (message.dtype, list(message.shape)) == ("float32", [2, 3])
    assert message.data == struct.pack("<6f", 1, 2, 3, 4, 5, 6)
    assert tensor_to_pb(torch.tensor([1.0], dtype=torch.bfloat16)).data == b"\x80\x3f"


def test_views_and_parameters_are_sent_by_their_values() -> None:
    x = randn(4, 6)
    for view in (x.T, x[1:3, ::2], x[:1].expand(3, 6), torch.nn.Parameter(x)):
        assert_same(tensor_from_pb(sent(tensor_to_pb(view))), view.detach())


def test_a_received_tensor_is_a_copy() -> None:
    message = tensor_to_pb(torch.zeros(3))
    tensor_from_pb(message).add_(1)
    assert message.data == bytes(12)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (pb.Tensor(dtype="float32", shape=[2, 3], data=bytes(23)), r"23 bytes for shape \(2, 3\), expected 24"),
        (pb.Tensor(dtype="float32", shape=[2, 3], data=bytes(25)), r"25 bytes for shape \(2, 3\), expected 24"),
        (pb.Tensor(dtype="bfloat16", shape=[], data=b""), r"0 bytes for shape \(\), expected 2"),
        (pb.Tensor(dtype="uint8", shape=[0], data=b"a"), r"1 bytes for shape \(0,\), expected 0"),
        (pb.Tensor(dtype="uint8", shape=[2**32 - 1] * 4, data=b"a"), "1 bytes for shape"),
        (pb.Tensor(dtype="uint8", shape=[1] * 100_000, data=b"a"), "^shape has 100000 axes, expected at most 8$"),
        (pb.Tensor(dtype="uint8", shape=[0, *[2**32 - 1] * 4]), "too large"),
        (pb.Tensor(dtype="x" * 100_000, shape=[1], data=b"a"), "^dtype is .{,40}, expected one of"),
        (pb.Tensor(dtype="float64", shape=[1], data=bytes(8)), "dtype is 'float64', expected one of float32, float16"),
        (pb.Tensor(), "dtype is ''"),
    ],
    ids=["too few", "too many", "scalar", "empty", "huge", "axes", "strides", "long", "float64", "nothing"],
)
def test_data_that_do_not_fill_the_shape_are_refused(message: pb.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tensor_from_pb(message)


def test_a_session_arrives() -> None:
    motion = randn(4, 19, 3, 2, dtype=torch.bfloat16)
    session = session_from_pb(sent(pb.Session(id="a-b", seed=2**63 - 1, motion=tensor_to_pb(motion), width=64)))
    assert (session.id, session.seed) == ("a-b", 2**63 - 1)
    assert_same(session.motion, motion)


def test_options_that_a_session_leaves_out_are_none() -> None:
    motion = tensor_to_pb(torch.zeros(1, 1, 1, 1))
    session = session_from_pb(sent(pb.Session(motion=motion)))
    assert (session.sink_update_block, session.sink_distance, session.audio_right_frames) == (None, None, None)
    chosen = pb.Session(
        motion=motion, sink_update_block=0, min_sink_distance=0, max_sink_distance=9, audio_right_frames=0
    )
    session = session_from_pb(sent(chosen))
    assert (session.sink_update_block, session.sink_distance, session.audio_right_frames) == (0, (0, 9), 0)


def test_an_audio_session_has_an_id_and_an_audio_context() -> None:
    session = audio_session_from_pb(OpenEncode(session_id="a-b"))
    assert (session.id, session.seed, session.motion.numel()) == ("a-b", 0, 0)
    assert session.audio_right_frames is None
    assert audio_session_from_pb(OpenEncode(right_frames=0)).audio_right_frames == 0


@pytest.mark.parametrize("num_tokens", [0, 7])
def test_conditions_arrive(num_tokens: int) -> None:
    conditions = Conditions(3, randn(4, 1, 3, 2), randn(num_tokens, 8))
    arrived = conditions_from_pb(sent(conditions_to_pb(conditions)))
    assert arrived.version == 3
    assert_same(arrived.sink, conditions.sink)
    assert_same(arrived.text, conditions.text)


def test_conditions_without_text_have_no_tokens() -> None:
    arrived = conditions_from_pb(sent(pb.Conditions(version=1, sink=tensor_to_pb(randn(4, 1, 3, 2)))))
    assert arrived.version == 1
    assert arrived.text.shape == (0, 0)


@pytest.mark.parametrize("has_latent", [False, True])
def test_a_block_arrives(has_latent: bool) -> None:
    conditions = Conditions(2, randn(4, 1, 3, 2), torch.zeros(0, 0))
    latent = randn(4, 3, 3, 2) if has_latent else None
    block = Block(2**40, randn(5, 8, 12), latent, conditions, "00-ab-cd-01")
    message = arrived_as(block_to_wire(block))
    assert message.head.conditions == 2
    arrived = block_from_wire(message, conditions)
    assert (arrived.index, arrived.traceparent) == (2**40, "00-ab-cd-01")
    assert arrived.conditions is conditions
    assert_same(arrived.features, block.features)
    if has_latent:
        assert_same(arrived.latent, latent)
    else:
        assert arrived.latent is None


def test_inputs_of_a_listening_network_arrive() -> None:
    block = Block(1, randn(5, 8, 12), heard=randn(5, 8, 12), face_motion=randn(6, 12))
    arrived = block_from_wire(arrived_as(block_to_wire(block)), None)
    assert_same(arrived.heard, block.heard)
    assert_same(arrived.face_motion, block.face_motion)
    plain = block_from_wire(arrived_as(block_to_wire(replace(block, heard=None, face_motion=None))), None)
    assert (plain.heard, plain.face_motion) == (None, None)


def test_a_moved_reference_arrives_with_the_latent() -> None:
    block = Block(1, randn(5, 8, 12), randn(4, 3, 3, 2), moved=randn(4, 3, 3, 2).bfloat16())
    for message in (block_to_wire(block), latent_to_wire(block)):
        arrived = block_from_wire(arrived_as(message), None)
        assert_same(arrived.latent, block.latent)
        assert_same(arrived.moved, block.moved)


def test_a_block_that_is_not_admitted_names_no_conditions() -> None:
    message = arrived_as(block_to_wire(Block(1, randn(5, 8, 12))))
    assert message.head.conditions == 0
    assert block_from_wire(message, None).conditions is None


def test_a_denoiser_answers_with_the_latent_alone() -> None:
    conditions = Conditions(2, randn(4, 1, 3, 2), torch.zeros(0, 0))
    block = Block(7, randn(5, 8, 12), randn(4, 3, 3, 2), conditions, "00-ab-cd-01")
    message = arrived_as(latent_to_wire(block))
    assert {field.name for field, _ in message.to_pb().ListFields()} == {"index", "latent", "traceparent"}
    arrived = block_from_wire(message, None)
    assert (arrived.index, arrived.traceparent) == (7, "00-ab-cd-01")
    assert arrived.features.numel() == 0
    assert_same(arrived.latent, block.latent)


def test_a_latent_leaves_the_gpu_for_pinned_memory_without_a_wait() -> None:
    latent = randn(16, 3, 8, 8)
    with stand_in_gpu() as gpu:
        arrived = on_host(Block(0, randn(1, 2, 12), placed(latent.clone(), "gpu"))).latent
        assert arrived is not None
        assert not arrived.is_cuda
        (copy,) = gpu.to_host
    assert copy.is_pinned
    assert not copy.is_waited_for
    assert_same(arrived, latent)
    on_cpu = Block(0, randn(1, 2, 12), latent)
    assert on_host(on_cpu) is on_cpu


def test_integers_are_scaled_by_their_full_range() -> None:
    piece = piece_from_bytes(struct.pack("<4h", -32768, 0, 16384, 32767), "pcm16", 16000, 1)
    assert piece.samples.tolist() == [[-1.0, 0.0, 0.5, 32767 / 32768]]
    assert (piece.rate_hz, piece.is_last) == (16000, False)
    assert piece.samples.dtype == torch.float32


def test_floats_are_taken_as_they_are() -> None:
    data = struct.pack("<3f", -1.5, 1e-30, 0.25)
    assert bytes_of(piece_from_bytes(data, "float32", 48000, 1).samples) == data


@pytest.mark.parametrize(("encoding", "letter", "scale"), [("pcm16", "h", 32768), ("float32", "f", 1)])
def test_stereo_is_interleaved(encoding: str, letter: str, scale: int) -> None:
    piece = piece_from_bytes(struct.pack(f"<6{letter}", 1, 2, 3, 4, 5, 6), encoding, 8000, 2)
    assert (piece.samples * scale).tolist() == [[1, 3, 5], [2, 4, 6]]


@pytest.mark.parametrize(
    ("size", "encoding", "num_channels", "words"),
    [
        (3, "pcm16", 1, "3 bytes are no whole number of 1-channel pcm16 samples"),
        (6, "pcm16", 2, "6 bytes are no whole number of 2-channel pcm16 samples"),
        (6, "float32", 1, "6 bytes are no whole number of 1-channel float32 samples"),
        (4, "pcm16", 0, "0 channels, expected 1 or 2"),
        (12, "pcm16", 3, "3 channels, expected 1 or 2"),
        (4, "mp3", 1, "encoding is 'mp3', expected one of pcm16, float32"),
    ],
)
def test_audio_of_partial_samples_is_refused(size: int, encoding: str, num_channels: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        piece_from_bytes(bytes(size), encoding, 16000, num_channels)


def test_slack_counts_from_the_arrival_of_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("avatar.rpc.codec.time", SimpleNamespace(monotonic=lambda: 100.0))
    assert [due_s(pb.Block(slack_s=slack_s)) for slack_s in (0.5, 0.0, -1.0)] == [100.5, 100.0, 99.0]
    assert due_s(AudioPiece(slack_s=2)) == 102
    assert block_from_wire(RelayedBlock(pb.Block(slack_s=3)), None).due_s == 103
    assert {due_s(pb.Block(slack_s=float(odd))) for odd in ("nan", "inf", "-inf")} == {None}
    assert due_s(AudioPiece()) is block_from_wire(RelayedBlock(pb.Block()), None).due_s is None
