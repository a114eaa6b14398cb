"""Blocks that pass through without being opened, and requests that are put together from what lies there already.

Python's protobuf puts one message into another by writing and reading it. A block of 1 MB is moved six times that way
for every stage that it is sent to; written with a tag and a length in front of its bytes, once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from avatar.worker.v1 import types_pb2

LENGTH_DELIMITED = 2
FIELDS = types_pb2.Block.DESCRIPTOR.fields_by_name


@dataclass(eq=False)
class RelayedBlock:
    """A block as its reader passes it on.

    head: what is read of it. features, latent: those fields as they are written, in parts.
    """

    head: types_pb2.Block
    features: Sequence[bytes] = ()
    latent: Sequence[bytes] = ()

    @classmethod
    def of(cls, block: types_pb2.Block) -> "RelayedBlock":
        """A block of features, which the message then has no more."""
        features = field(FIELDS["features"].number, block.features)
        block.ClearField("features")
        return cls(block, features)

    def with_latent(self, latent: types_pb2.Tensor) -> "RelayedBlock":
        """The same block with another latent; a message of its own, since what was sent is kept."""
        head = types_pb2.Block()
        head.CopyFrom(self.head)
        return RelayedBlock(head, self.features, field(FIELDS["latent"].number, latent))

    @property
    def index(self) -> int:
        return self.head.index

    def parts(self) -> list[bytes]:
        """The message as it is written, in parts."""
        return [self.head.SerializeToString(), *self.features, *self.latent]


def field(number: int, message: Message | RelayedBlock) -> list[bytes]:
    """A message as a field of another one, as it is written, in parts."""
    parts = message.parts() if isinstance(message, RelayedBlock) else [message.SerializeToString()]
    return [_varint(number << 3 | LENGTH_DELIMITED) + _varint(sum(map(len, parts))), *parts]


def written(request: Any) -> bytes:
    """A request's bytes, where it is a message or the parts of one."""
    return b"".join(request) if isinstance(request, list) else request.SerializeToString()


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)
