"""Blocks and motion latents that are relayed without being opened, in requests assembled from serialized parts.

Python's protobuf copies one message into another by serializing and parsing it. A block of 1 MB would be copied six
times for every stage that it is sent to. With a tag and a length written before its serialized bytes it is copied once.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from google.protobuf.message import Message

from avatar.worker.v1 import types_pb2

LENGTH_DELIMITED = 2
# What a denoiser reads of a block beside its latent.
INPUTS: tuple[Literal["features", "heard", "face_motion"], ...] = ("features", "heard", "face_motion")
FIELDS = types_pb2.Block.DESCRIPTOR.fields_by_name
MOTION = types_pb2.Session.DESCRIPTOR.fields_by_name["motion"].number


@dataclass(eq=False)
class RelayedBlock:
    """A block that is passed on with its tensors serialized.

    head: the message without inputs and latent. inputs, latent: those fields as their serialized parts.
    due_s: deadline of the stage that it is sent to, on the clock of `time.monotonic`; None without one.
    index: of the block.
    """

    head: types_pb2.Block
    inputs: Sequence[bytes] = ()
    latent: Sequence[bytes] = ()
    due_s: float | None = None
    index: int = field(init=False)

    def __post_init__(self) -> None:
        self.index = self.head.index

    @classmethod
    def from_pb(cls, block: types_pb2.Block) -> "RelayedBlock":
        """Make a relayed block of a message without a latent; takes the inputs out of the message."""
        inputs: list[bytes] = []
        for name in INPUTS:
            if block.HasField(name):
                inputs += serialize_field(FIELDS[name].number, getattr(block, name))
                block.ClearField(name)
        return cls(block, inputs)

    def with_latent(self, latent: types_pb2.Tensor) -> "RelayedBlock":
        """Return the block with another latent. The head is copied: a replay may keep the block as it was sent."""
        head = types_pb2.Block()
        head.CopyFrom(self.head)
        return RelayedBlock(head, self.inputs, serialize_field(FIELDS["latent"].number, latent))

    def parts(self) -> list[bytes]:
        """Serialize the message for sending it now, in parts: on the wire, a deadline is relative to the sending."""
        if self.due_s is not None:
            self.head.slack_s = self.due_s - time.monotonic()
        return [self.head.SerializeToString(), *self.inputs, *self.latent]


def serialize_session(opened: type[Message], session: types_pb2.Session, motion: bytes) -> list[bytes]:
    """Serialize the field `session` of an `open` message, in parts; `motion` is one of them, and is not copied.

    opened: the type of the message. motion: the session's motion latents, a serialized Tensor.
    """
    constants = types_pb2.Session()
    constants.CopyFrom(session)
    for unneeded in ("prompt", "tenant"):
        constants.ClearField(unneeded)
    parts = [constants.SerializeToString(), *_field(MOTION, [motion])]
    return _field(opened.DESCRIPTOR.fields_by_name["session"].number, parts)


def serialize_field(number: int, message: Message | RelayedBlock, more: Sequence[bytes] = ()) -> list[bytes]:
    """Serialize a message as a field of another one, in parts.

    more: further fields of the message, each as its serialized parts.
    """
    parts = message.parts() if isinstance(message, RelayedBlock) else [message.SerializeToString()]
    return _field(number, [*parts, *more])


def _field(number: int, parts: Sequence[bytes]) -> list[bytes]:
    return [_varint(number << 3 | LENGTH_DELIMITED) + _varint(sum(map(len, parts))), *parts]


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)
