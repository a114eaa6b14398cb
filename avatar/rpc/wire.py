"""Blocks and motion latents whose tensors stay serialized, in messages assembled from serialized parts.

Python's protobuf copies one message into another by serializing and parsing it. A block of 1 MB would be copied six
times for every stage that it is sent to. Here its tensors stay slices of the bytes that arrived: a gateway copies them
once, with a tag and a length before them, into the next request, and a worker once, into tensors.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from avatar.worker.v1 import types_pb2

# Of a serialized message, in order.
Parts: TypeAlias = Sequence[bytes | memoryview]

LENGTH_DELIMITED = 2
MAX_VARINT_BYTES = 10
# Fields of a block that a denoiser reads beside its latent.
INPUTS: tuple[Literal["features", "heard", "face_motion"], ...] = ("features", "heard", "face_motion")
FIELDS = types_pb2.Block.DESCRIPTOR.fields_by_name
# Those that a level passes on to the next.
PASSED_ON: tuple[Literal["latent", "moved"], ...] = ("latent", "moved")
INPUT_NUMBERS, LATENT = {FIELDS[name].number for name in INPUTS}, FIELDS["latent"].number
PASSED_NUMBERS = {FIELDS[name].number for name in PASSED_ON}
ELEMENTS = types_pb2.Tensor.DESCRIPTOR.fields_by_name["data"].number
MOTION = types_pb2.Session.DESCRIPTOR.fields_by_name["motion"].number


@dataclass(eq=False)
class RelayedBlock:
    """A block with its tensors serialized.

    head: the message without its tensors. inputs: those of a denoiser, as their serialized parts. latent: the latent,
    and the moved reference if there is one.
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
            (inputs if number in INPUT_NUMBERS else latent if number in PASSED_NUMBERS else head).append(part)
        return cls(types_pb2.Block.FromString(b"".join(head)), inputs, latent)

    def to_pb(self) -> types_pb2.Block:
        """Return the message."""
        return types_pb2.Block.FromString(b"".join(self.parts()))

    def tensor(self, name: str) -> tuple[types_pb2.Tensor, bytes | memoryview] | None:
        """Return a tensor's message without its elements, and the elements; None if the block lacks it.

        The block is one of `from_bytes`. name: of the field. ValueError if its bytes are not a tensor.
        """
        number = FIELDS[name].number
        try:
            sent = [each for part in (*self.inputs, *self.latent) for each in _contents(memoryview(part), number)]
            if not sent:
                return None
            # A field that occurs more than once is the merger of its occurrences, as of a message of all their bytes.
            content = sent[0] if len(sent) == 1 else memoryview(b"".join(sent))
            head = b"".join(part for number, part in _fields(content) if number != ELEMENTS)
            elements = _contents(content, ELEMENTS)
            return types_pb2.Tensor.FromString(head), elements[-1] if elements else b""
        except DecodeError as error:
            raise ValueError(f"the bytes of {name} are not a tensor") from error

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


def block_field(message: Descriptor) -> FieldDescriptor | None:
    """Return the field of a request or response that holds a block; None if it has none."""
    return next((each for each in message.fields if each.message_type is types_pb2.Block.DESCRIPTOR), None)


def parse_part(data: bytes, message: type[Message], block: FieldDescriptor) -> Message | RelayedBlock:
    """Return the block that a serialized request or response holds, or else the message. DecodeError if it is neither.

    block: the message's field for blocks.
    """
    tag = _varint(block.number << 3 | LENGTH_DELIMITED)
    if data.startswith(tag):
        size, start = _read_varint(data, len(tag))
        if start + size == len(data):
            return RelayedBlock.from_bytes(memoryview(data)[start:])
    whole = message.FromString(data)
    if whole.HasField(block.name):  # with fields beside it, of a newer version
        return RelayedBlock.from_bytes(getattr(whole, block.name).SerializeToString())
    return whole


def serialize_part(part: Message | RelayedBlock, block: FieldDescriptor) -> bytes:
    """Serialize a request or response, which may be given as the block that it holds.

    block: the message's field for blocks.
    """
    return b"".join(serialize_field(block.number, part)) if isinstance(part, RelayedBlock) else part.SerializeToString()


def serialize_tensor(name: str, head: types_pb2.Tensor, elements: memoryview) -> list[bytes | memoryview]:
    """Serialize a tensor of a block, in parts; the elements are one of them, and are not copied.

    name: of the block's field. head: the tensor's message without its elements.
    """
    return _field(FIELDS[name].number, [head.SerializeToString(), *_field(ELEMENTS, [elements])])


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


def _contents(data: memoryview, number: int) -> list[memoryview]:
    """Return the content of each field of this number. DecodeError if one has no length."""
    contents = []
    for each in (part for found, part in _fields(data) if found == number):
        tag, end = _read_varint(each, 0)
        if tag & 7 != LENGTH_DELIMITED:
            raise DecodeError(f"wire type {tag & 7}")
        contents.append(each[_read_varint(each, end)[1] :])
    return contents


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
