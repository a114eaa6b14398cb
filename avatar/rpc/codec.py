"""Conversion of our types to messages and back. The only module that handles both tensors and messages."""

import math
import sys
import time

import torch
from torch import Tensor

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
SAMPLE_DTYPES = {"pcm16": torch.int16, "float32": torch.float32}


def tensor_to_pb(x: Tensor) -> pb.Tensor:
    """Return the message of a tensor of any shape, in its own dtype."""
    data = x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return pb.Tensor(dtype=NAMES[x.dtype], shape=x.shape, data=data)


def tensor_from_pb(message: pb.Tensor) -> Tensor:
    """Return the tensor of a message. ValueError if its dtype is unknown or its data do not fill its shape."""
    dtype = DTYPES.get(message.dtype)
    if dtype is None:
        raise ValueError(f"dtype is {message.dtype!r}, expected one of {', '.join(DTYPES)}")
    expected = math.prod(message.shape) * dtype.itemsize
    data = message.data  # each access makes a copy
    if len(data) != expected:
        raise ValueError(f"{len(data)} bytes for shape {tuple(message.shape)}, expected {expected}")
    if not expected:
        return torch.empty(tuple(message.shape), dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(tuple(message.shape))


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


def block_to_pb(block: Block) -> pb.Block:
    """Return the message of a whole block; see `latent_to_pb` for a denoiser's answer."""
    return pb.Block(
        index=block.index,
        features=tensor_to_pb(block.features),
        latent=None if block.latent is None else tensor_to_pb(block.latent),
        conditions=block.conditions.version if block.conditions else 0,
        traceparent=block.traceparent,
        statistics=block.statistics,
        heard=None if block.heard is None else tensor_to_pb(block.heard),
        face_motion=None if block.face_motion is None else tensor_to_pb(block.face_motion),
    )


def latent_to_pb(block: Block) -> pb.Block:
    """Return a denoiser's answer: the latent alone, since the caller keeps the inputs; none if it was handed over."""
    latent = None if block.latent is None else tensor_to_pb(block.latent)
    return pb.Block(index=block.index, latent=latent, traceparent=block.traceparent)


def block_from_pb(message: pb.Block, conditions: Conditions | None) -> Block:
    """Return the block; `conditions` are of the version that it names, or None if the receiver does not need them."""
    return Block(
        index=message.index,
        features=tensor_from_pb(message.features) if message.HasField("features") else torch.zeros(0, 0, 0),
        latent=tensor_from_pb(message.latent) if message.HasField("latent") else None,
        conditions=conditions,
        traceparent=message.traceparent,
        due_s=due_s(message),
        heard=tensor_from_pb(message.heard) if message.HasField("heard") else None,
        face_motion=tensor_from_pb(message.face_motion) if message.HasField("face_motion") else None,
    )


def due_s(message: pb.Block | AudioPieceMessage) -> float | None:
    """Return the deadline of a message that has just arrived, on the clock of `time.monotonic`; None without slack."""
    return time.monotonic() + message.slack_s if message.HasField("slack_s") else None


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
        raise ValueError(f"encoding is {encoding!r}, expected one of {', '.join(SAMPLE_DTYPES)}")
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
