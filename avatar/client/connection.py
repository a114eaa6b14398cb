"""A channel to a gateway: its options, the bearer token, and calls whose errors are AvatarErrors."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, TypeVar

import grpc
import grpc.aio

from avatar.rpc.channel import OPTIONS
from avatar.rpc.status import error_of
from avatar.v1 import avatar_service_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from avatar.v1.avatar_service_pb2_grpc import AvatarServiceAsyncStub

Response = TypeVar("Response")

CALL_S = 30.0
# The gateway keeps a broken stream for seconds only, so keep the reconnect backoff short.
BACKOFF = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]


@dataclass(frozen=True)
class Connection:
    """A gateway's stub, and the metadata that every call carries."""

    stub: "AvatarServiceAsyncStub"
    metadata: Sequence[tuple[str, str]]

    async def call(
        self, method: Callable[..., Awaitable[Response]], request: object, timeout_s: float = CALL_S
    ) -> Response:
        """Return the response of a unary call. Raises the AvatarError that it ended with."""
        try:
            return await method(request, timeout=timeout_s, metadata=self.metadata)
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error


@asynccontextmanager
async def open_connection(
    target: str, credentials: grpc.ChannelCredentials | None, token: str, *, plaintext_token: bool
) -> AsyncGenerator[Connection, None]:
    """Open a channel to HOST:PORT while the body runs; arguments and errors as those of `connect`."""
    if token and not credentials and not plaintext_token and not _is_local(target):
        raise ValueError(
            f"the token would be sent to {target} in plain text; give credentials, or plaintext_token=True"
        )
    options = [*OPTIONS, *BACKOFF]
    channel = (
        grpc.aio.secure_channel(target, credentials, options=options)
        if credentials
        else grpc.aio.insecure_channel(target, options=options)
    )
    async with channel:
        yield Connection(pb_grpc.AvatarServiceStub(channel), [("authorization", f"Bearer {token}")] if token else [])


def _is_local(target: str) -> bool:
    """Return whether a connection to HOST:PORT stays on this machine."""
    host = target.rpartition(":")[0].rpartition("/")[2].strip("[]")
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return target.startswith("unix:")
