"""A channel to a gateway: its options, the bearer token, and calls whose errors are AvatarErrors."""

from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from typing import TypeVar

import grpc
import grpc.aio

from avatar.rpc.channel import OPTIONS
from avatar.rpc.status import error_of
from avatar.v1 import avatar_service_pb2_grpc as pb_grpc

Response = TypeVar("Response")

CALL_S = 30.0
# Metadata by which a router sends all calls about a session to one gateway: see deploy/envoy.
SESSION = "avatar-session"
# The gateway keeps a broken stream for seconds only, so connect again often. The minimum is no delay: it is the time
# that an attempt has for its handshakes.
BACKOFF = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 150),
]


class Connection:
    """A gateway's stub, and the metadata of its calls."""

    def __init__(self, channel: grpc.aio.Channel, token: str) -> None:
        self._channel = channel
        self.stub: pb_grpc.AvatarServiceAsyncStub = pb_grpc.AvatarServiceStub(channel)
        self._token = [("authorization", f"Bearer {token}")] if token else []

    def metadata(self, session_id: str = "") -> list[tuple[str, str]]:
        """Return the metadata of a call: the token, and for routers the name of the session that it is about."""
        return [*self._token, (SESSION, session_id)] if session_id else self._token

    async def ready(self) -> None:
        """Wait until the channel is connected."""
        await self._channel.channel_ready()

    async def call(
        self,
        method: Callable[..., Awaitable[Response]],
        request: object,
        timeout_s: float = CALL_S,
        *,
        session_id: str = "",
    ) -> Response:
        """Return the response of a unary call, about a session or none. Raises the AvatarError that it ended with."""
        try:
            return await method(request, timeout=timeout_s, metadata=self.metadata(session_id))
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error


def open_channel(target: str, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    """Return a channel to HOST:PORT; plain text without credentials."""
    options = [*OPTIONS, *BACKOFF]
    if credentials is None:
        return grpc.aio.insecure_channel(target, options=options)
    return grpc.aio.secure_channel(target, credentials, options=options)


def is_local(target: str) -> bool:
    """Return whether a connection to HOST:PORT stays on this machine."""
    host = target.rpartition(":")[0].rpartition("/")[2].strip("[]")
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return target.startswith("unix:")
