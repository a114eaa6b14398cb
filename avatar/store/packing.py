"""Messages as the store keeps them: a version byte and a checksum, then the message.

Tensors are raw numbers with dtype and shape. Reading refuses a value that is damaged or of another kind, or a tensor
that does not fill its shape. Nothing is ever unpickled.
"""

import math
import zlib
from typing import TypeVar

from google.protobuf.message import Message

from avatar.errors import StateCorrupt
from avatar.worker.v1 import types_pb2 as pb

Stored = TypeVar("Stored", bound=Message)
VERSION = b"\x01"
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1}


def pack(message: Message) -> bytes:
    """Return a message as a value of the store."""
    data = message.SerializeToString()
    return VERSION + _checksum(type(message), data) + data


def pack_position(position: pb.Position) -> bytes:
    """Return a position without the parts that a record keeps in fields of their own: `ttl_s` and `is_closed`."""
    stored = pb.Position()
    stored.CopyFrom(position)
    stored.ClearField("ttl_s")
    stored.ClearField("is_closed")
    return pack(stored)


def unpack(value: bytes, kind: type[Stored], what: str) -> Stored:
    """Return the message in a value. StateCorrupt, which names `what`, if it is damaged or of another kind."""
    version, checksum, data = value[:1], value[1:5], value[5:]
    if version != VERSION:
        raise StateCorrupt(f"{what} has version byte {version!r}, expected {VERSION!r}")
    if checksum != _checksum(kind, data):
        raise StateCorrupt(f"{what} is damaged, or is no {kind.DESCRIPTOR.name}")
    message = kind()
    message.ParseFromString(data)
    if isinstance(message, pb.Tensor) and not _is_whole(message):
        raise StateCorrupt(f"{what} does not fill its shape")
    for descriptor, content in message.ListFields():
        if isinstance(content, pb.Tensor) and not _is_whole(content):
            raise StateCorrupt(f"{descriptor.name} of {what} does not fill its shape")
    return message


def _checksum(kind: type[Message], data: bytes) -> bytes:
    """Return four bytes over the message's kind and its bytes, since bytes cut short or of another kind may parse."""
    return zlib.crc32(data, zlib.crc32(kind.DESCRIPTOR.full_name.encode())).to_bytes(4, "big")


def _is_whole(tensor: pb.Tensor) -> bool:
    item_bytes = ITEM_BYTES.get(tensor.dtype)
    return item_bytes is not None and len(tensor.data) == item_bytes * math.prod(tensor.shape)
