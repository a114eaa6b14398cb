"""Blocks and motion latents that are relayed without being opened, in requests assembled from serialized parts.

Python's protobuf copies one message into another by serializing and parsing it. A block of 1 MB would be copied six
times for every stage that it is sent to. Here its tensors stay slices of the bytes that arrived, and are copied once,
with a tag and a length before them, into the next request.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from google.protobuf.message import DecodeError, Message

from avatar.worker.v1 import types_pb2

# Of a serialized message, in order.
Parts: TypeAlias = Sequence[bytes | memoryview]

LENGTH_DELIMITED = 2
MAX_VARINT_BYTES = 10
# Fields of a block that a denoiser reads beside its latent.
INPUTS: tuple[Literal["features", "heard", "face_motion"], ...] = ("features", "heard", "face_motion")
FIELDS = types_pb2.Block.DESCRIPTOR.fields_by_name
INPUT_NUMBERS, LATENT = {FIELDS[name].number for name in INPUTS}, FIELDS["latent"].number
MOTION = types_pb2.Session.DESCRIPTOR.fields_by_name["motion"].number


@dataclass(eq=False)
class RelayedBlock:
    """A block that is passed on with its tensors serialized.

    head: the message without inputs and latent. inputs, latent: those fields as their serialized parts.
    due_s: deadline of the stage that it is sent to, on the clock of `time.monotonic`; None without one.
    index: of the block.
    """

    head: types_pb2.Block
    inputs: Parts = ()
    latent: Parts = ()
    due_s: float | None = None
    index: int = field(init=False)

    def __post_init__(self) -> None:
        self.index = self.head.index

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> "RelayedBlock":
        """Parse a serialized block, except for its tensors. DecodeError if the bytes are not a block."""
        head: list[bytes | memoryview] = []
        inputs: list[bytes | memoryview] = []
        latent: list[bytes | memoryview] = []
        for number, part in _fields(memoryview(data)):
            (inputs if number in INPUT_NUMBERS else latent if number == LATENT else head).append(part)
        return cls(types_pb2.Block.FromString(b"".join(head)), inputs, latent)

    def to_pb(self) -> types_pb2.Block:
        """Return the message."""
        return types_pb2.Block.FromString(b"".join(self.parts()))

    def with_latent(self, latent: Parts) -> "RelayedBlock":
        """Return the block with another latent. The head is copied: a replay may keep the block as it was sent."""
        head = types_pb2.Block()
        head.CopyFrom(self.head)
        return RelayedBlock(head, self.inputs, latent)

    def parts(self) -> list[bytes | memoryview]:
        """Serialize the message for sending it now, in parts: on the wire, a deadline is relative to the sending."""
        if self.due_s is not None:
            self.head.slack_s = self.due_s - time.monotonic()
        return [self.head.SerializeToString(), *self.inputs, *self.latent]


def parse_response(data: bytes, number: int, response: type[Message]) -> Message | RelayedBlock:
    """Return the block that a serialized response holds, or else the response.

    number: of the response's field for blocks.
    """
    tag = _varint(number << 3 | LENGTH_DELIMITED)
    if not data.startswith(tag):
        return response.FromString(data)
    size, start = _read_varint(data, len(tag))
    if start + size != len(data):
        raise DecodeError(f"a block of {size} bytes in a response with {len(data) - start}")
    return RelayedBlock.from_bytes(memoryview(data)[start:])


def serialize_session(opened: type[Message], session: types_pb2.Session, motion: bytes) -> list[bytes | memoryview]:
    """Serialize the field `session` of an `open` message, in parts; `motion` is one of them, and is not copied.

    opened: the type of the message. motion: the session's motion latents, a serialized Tensor.
    """
    constants = types_pb2.Session()
    constants.CopyFrom(session)
    for unneeded in ("prompt", "tenant"):
        constants.ClearField(unneeded)
    parts = [constants.SerializeToString(), *_field(MOTION, [motion])]
    return _field(opened.DESCRIPTOR.fields_by_name["session"].number, parts)


def serialize_field(number: int, message: Message | RelayedBlock, more: Parts = ()) -> list[bytes | memoryview]:
    """Serialize a message as a field of another one, in parts.

    more: further fields of the message, each as its serialized parts.
    """
    parts = message.parts() if isinstance(message, RelayedBlock) else [message.SerializeToString()]
    return _field(number, [*parts, *more])


def _field(number: int, parts: Parts) -> list[bytes | memoryview]:
    return [_varint(number << 3 | LENGTH_DELIMITED) + _varint(sum(map(len, parts))), *parts]


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield each field's number, and its bytes with tag and length. DecodeError if the bytes are not a message.

    Source of the wire types: https://protobuf.dev/programming-guides/encoding.
    """
    start = 0
    while start < len(data):
        tag, end = _read_varint(data, start)
        match tag & 7:
            case 0:
                _, end = _read_varint(data, end)
            case 1:
                end += 8
            case 2:
                size, end = _read_varint(data, end)
                end += size
            case 5:
                end += 4
            case kind:
                raise DecodeError(f"wire type {kind}")
        if end > len(data):
            raise DecodeError("the message is cut off")
        yield tag >> 3, data[start:end]
        start = end


def _read_varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    """Return the number at a position, and the position behind it. DecodeError if there is none."""
    number = 0
    for place, byte in enumerate(data[at : at + MAX_VARINT_BYTES]):
        number |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return number, at + place + 1
    raise DecodeError("the message is cut off")
