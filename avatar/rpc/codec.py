"""Conversion of our types to messages and back. The only module that handles both tensors and messages."""

import math
import reprlib
import sys
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from avatar.rpc.wire import INPUTS, PASSED_ON, Parts, RelayedBlock, serialize_tensor
from avatar.runtime.admission import DeviceLoad
from avatar.types import AudioPiece, Block, Conditions, HeardAudio, Session
from avatar.worker.v1 import types_pb2 as pb
from avatar.worker.v1.audio_pb2 import AudioPiece as AudioPieceMessage
from avatar.worker.v1.audio_pb2 import HeardAudio as HeardAudioMessage
from avatar.worker.v1.audio_pb2 import OpenEncode
from avatar.worker.v1.denoiser_pb2 import OpenDenoise
from avatar.worker.v1.vae_pb2 import OpenDecode

assert sys.byteorder == "little", "tensors are sent as their bytes in memory, and the wire is little-endian"

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "uint8": torch.uint8}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
TENSORS = (*INPUTS, *PASSED_ON)
# More than any tensor of ours has; torch stops at 64.
MAX_AXES = 8
SAMPLE_DTYPES = {"pcm16": torch.int16, "float32": torch.float32}


def tensor_to_pb(x: Tensor) -> pb.Tensor:
    """Return the message of a tensor of any shape, in its own dtype."""
    return pb.Tensor(dtype=NAMES[x.dtype], shape=x.shape, data=bytes(_elements(x)))


def tensor_from_pb(message: pb.Tensor) -> Tensor:
    """Return the tensor of a message.

    ValueError if its dtype is unknown, it has over MAX_AXES axes, or its data do not fill its shape.
    """
    return _tensor(message, message.data)


def _tensor(head: pb.Tensor, elements: bytes | memoryview) -> Tensor:
    """Return the tensor of a message and its elements, which are copied."""
    dtype = DTYPES.get(head.dtype)
    if dtype is None:
        raise ValueError(f"dtype is {reprlib.repr(head.dtype)}, expected one of {', '.join(DTYPES)}")
    if len(head.shape) > MAX_AXES:
        raise ValueError(f"shape has {len(head.shape)} axes, expected at most {MAX_AXES}")
    shape = tuple(head.shape)
    expected = math.prod(shape) * dtype.itemsize
    if len(elements) != expected:
        raise ValueError(f"{len(elements)} bytes for shape {shape}, expected {expected}")
    if not expected:
        try:
            return torch.empty(shape, dtype=dtype)
        except RuntimeError as error:  # strides overflow, although there are no elements
            raise ValueError(f"shape {shape} is too large") from error
    return torch.frombuffer(bytearray(elements), dtype=dtype).reshape(shape)


def _elements(x: Tensor) -> memoryview:
    """Return a tensor's elements as bytes. They share its memory if they are contiguous there."""
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def session_from_open(message: OpenDenoise | OpenDecode) -> Session:
    """Return the session that an `open` message carries. ValueError if it carries none."""
    if not message.HasField("session"):
        raise ValueError("the message carries no session; a gateway of an older version does not send it")
    return session_from_pb(message.session)


def session_from_pb(message: pb.Session) -> Session:
    """Return a session's constants; None for each option that the session leaves to the checkpoint."""
    has = message.HasField
    return Session(
        id=message.id,
        seed=message.seed,
        motion=tensor_from_pb(message.motion),
        sink_update_block=message.sink_update_block if has("sink_update_block") else None,
        sink_distance=(message.min_sink_distance, message.max_sink_distance) if has("min_sink_distance") else None,
        audio_right_frames=message.audio_right_frames if has("audio_right_frames") else None,
    )


def audio_session_from_pb(message: OpenEncode) -> Session:
    """Return a session for the audio stage, which depends on the seed and not on the picture."""
    right_frames = message.right_frames if message.HasField("right_frames") else None
    return Session(id=message.session_id, seed=message.seed, motion=torch.zeros(0), audio_right_frames=right_frames)


def conditions_to_pb(conditions: Conditions) -> pb.Conditions:
    return pb.Conditions(
        version=conditions.version, sink=tensor_to_pb(conditions.sink), text=tensor_to_pb(conditions.text)
    )


def conditions_from_pb(message: pb.Conditions) -> Conditions:
    text = tensor_from_pb(message.text) if message.HasField("text") else torch.zeros(0, 0)
    return Conditions(version=message.version, sink=tensor_from_pb(message.sink), text=text)


def block_to_wire(block: Block) -> RelayedBlock:
    """Return a whole block as it is sent; see `latent_to_wire` for a denoiser's answer."""
    head = pb.Block(
        index=block.index,
        conditions=block.conditions.version if block.conditions else 0,
        traceparent=block.traceparent,
        statistics=block.statistics,
    )
    inputs = {"features": block.features, "heard": block.heard, "face_motion": block.face_motion}
    parts = [part for name, x in inputs.items() if x is not None for part in _serialized(name, x)]
    return RelayedBlock(head, parts, _latent(block))


def on_host(block: Block) -> Block:
    """Copy what a block passes on into the host's memory, pinned if it comes from a GPU.

    A copy from a GPU has ended when the queue's job has: the queue synchronizes.
    """
    copies: dict[str, Any] = {}
    for name in PASSED_ON:
        tensor: Tensor | None = getattr(block, name)
        if tensor is not None and tensor.is_cuda:
            pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            copies[name] = pinned.copy_(tensor, non_blocking=True)
    return replace(block, **copies) if copies else block


def latent_to_wire(block: Block) -> RelayedBlock:
    """Return a denoiser's answer: what is passed on, less what was handed over, since the caller keeps the inputs."""
    return RelayedBlock(pb.Block(index=block.index, traceparent=block.traceparent), latent=_latent(block))


def block_from_wire(block: RelayedBlock, conditions: Conditions | None) -> Block:
    """Return the block; `conditions` are of the version that it names, or None if the receiver does not need them.

    ValueError if a tensor has an unknown dtype, or elements that do not fill its shape.
    """
    tensors = {name: _tensor(*sent) for name in TENSORS if (sent := block.tensor(name))}
    return Block(
        index=block.index,
        features=tensors.get("features", torch.zeros(0, 0, 0)),
        latent=tensors.get("latent"),
        conditions=conditions,
        traceparent=block.head.traceparent,
        due_s=due_s(block.head),
        heard=tensors.get("heard"),
        face_motion=tensors.get("face_motion"),
        moved=tensors.get("moved"),
    )


def _latent(block: Block) -> Parts:
    tensors = {name: getattr(block, name) for name in PASSED_ON}
    return [part for name, x in tensors.items() if x is not None for part in _serialized(name, x)]


def _serialized(name: str, x: Tensor) -> Parts:
    """Serialize a tensor of a block, in parts that share its memory."""
    return serialize_tensor(name, pb.Tensor(dtype=NAMES[x.dtype], shape=x.shape), _elements(x))


def due_s(message: pb.Block | AudioPieceMessage) -> float | None:
    """Return the deadline of a message that has just arrived, on the clock of `time.monotonic`.

    None without slack, or if it is not finite: deadlines order the queue, and NaN has no place in an order.
    """
    return (
        time.monotonic() + message.slack_s if math.isfinite(message.slack_s) and message.HasField("slack_s") else None
    )


def heard_from_pb(message: HeardAudioMessage) -> HeardAudio:
    """Return a piece of the other person's audio. ValueError as in `piece_from_bytes`."""
    piece = piece_from_bytes(message.data, message.encoding, message.rate_hz, message.num_channels)
    return HeardAudio(piece.samples, piece.rate_hz, message.first_sample)


def piece_from_bytes(data: bytes, encoding: str, rate_hz: int, num_channels: int) -> AudioPiece:
    """Return a piece of audio, (channels, s). ValueError unless the data are whole samples of every channel.

    data: little-endian, channels interleaved; integers are divided by 32768, floats are taken as they are.
    """
    dtype = SAMPLE_DTYPES.get(encoding)
    if dtype is None:
        raise ValueError(f"encoding is {reprlib.repr(encoding)}, expected one of {', '.join(SAMPLE_DTYPES)}")
    if num_channels not in (1, 2):
        raise ValueError(f"{num_channels} channels, expected 1 or 2")
    if len(data) % (dtype.itemsize * num_channels):
        raise ValueError(f"{len(data)} bytes are no whole number of {num_channels}-channel {encoding} samples")
    samples = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
    scaled = samples / 32768 if dtype is torch.int16 else samples
    return AudioPiece(scaled.reshape(-1, num_channels).T.contiguous(), rate_hz)


def load_to_pb(load: DeviceLoad) -> pb.DeviceLoad:
    """Return the message of a queue's device and its load as it is now."""
    return pb.DeviceLoad(
        device=load.device.name,
        num_cores=load.device.num_cores,
        queue=load.queue,
        num_threads=load.device.num_threads,
        session_share=load.session_share,
        live_share=load.live_share,
    )
