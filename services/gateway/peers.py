"""The other gateways of this cell: calls about a session that streams at one of them are passed on to it.

A claim names the gateway and the cell where its session streams. A call is passed on once, with its caller's own token
and within its caller's deadline. Where it cannot be passed on, the error says where to send it.
"""

from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message

from avatar.errors import NotStreaming
from avatar.rpc.channel import channel
from avatar.rpc.interceptor import Context
from avatar.rpc.status import error_details, error_of
from avatar.rpc.tls import peer_credentials
from avatar.settings import GatewaySettings
from avatar.store.claims import Place
from avatar.v1 import avatar_service_pb2_grpc as pb_grpc

# Metadata of a call that was passed on.
FORWARDED = "avatar-forwarded"
# For callers that set no deadline.
FORWARD_S = 10.0


class Peers:
    """The other gateways of a cell.

    here: where sessions of this gateway stream, once it serves; its address is empty before.
    """

    def __init__(self, settings: GatewaySettings) -> None:
        self.here = Place("", settings.cell)
        self._settings = settings
        peer_credentials(settings.tls_cert, settings.tls_key)  # fail at the start, and not at the first call

    async def forward(self, method: str, request: Message, place: Place | None, context: Context) -> Any:
        """Return another gateway's response to a unary call about a session; raise the error that it ends with.

        place: where the session streams, None for nowhere. NotStreaming if the call cannot be passed on there; its
        metadata `gateway` and `cell` say where it can be sent.
        """
        if place is None:
            raise NotStreaming("no stream of this session is open")
        given = dict(context.invocation_metadata() or ())
        if place.cell != self.here.cell or FORWARDED in given or place.gateway in ("", self.here.gateway):
            raise _elsewhere(place)
        token = [("authorization", given["authorization"])] if "authorization" in given else []
        remaining_s = context.time_remaining()
        try:
            credentials = peer_credentials(self._settings.tls_cert, self._settings.tls_key)
        except ValueError as error:  # the files are being replaced
            raise _elsewhere(place) from error
        async with channel(place.gateway, credentials) as connection:
            call = getattr(pb_grpc.AvatarServiceStub(connection), method)
            try:
                return await call(
                    request, metadata=[(FORWARDED, "1"), *token], timeout=min(FORWARD_S, remaining_s or FORWARD_S)
                )
            except grpc.aio.AioRpcError as error:
                if error_details(error).reason:
                    raise error_of(error) from error
                raise _elsewhere(place) from error  # it is gone, or its certificate is not for its address


def _elsewhere(place: Place) -> NotStreaming:
    where = f"gateway {place.gateway or 'without an address'} of cell {place.cell}"
    message = f"the session streams at {where}; send the call there"
    return NotStreaming(message, metadata={"gateway": place.gateway, "cell": place.cell})
