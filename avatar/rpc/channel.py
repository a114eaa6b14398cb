"""Channels between our processes, and the gRPC options that both of their ends share."""

import grpc
import grpc.aio

# The largest message between workers is a reference's motion latents: 20 bytes a pixel in float32, 18 MB at 1280x704.
MAX_MESSAGE_BYTES = 64 << 20
# gRPC's own default, which a status with details needs too.
MAX_METADATA_BYTES = 8 << 10
OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Over the first limit a call may be refused, over the second it always is.
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", 2 * MAX_METADATA_BYTES),
    # A frozen peer is detected after keepalive time + ping timeout; without the ping timeout it would take a minute.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.ping_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
]


def channel(target: str, credentials: grpc.ChannelCredentials | None = None, *, name: str = "") -> grpc.aio.Channel:
    """Return a channel to HOST:PORT that reconnects soon after a lost peer is back; plain text without credentials.

    name: the name in the peer's certificate, where it is not the target's host; the target may be one of its addresses.
    """
    options = [*OPTIONS, ("grpc.initial_reconnect_backoff_ms", 200), ("grpc.max_reconnect_backoff_ms", 1000)]
    if credentials is None:
        return grpc.aio.insecure_channel(target, options=options)
    override = [("grpc.ssl_target_name_override", name)] if name else []
    return grpc.aio.secure_channel(target, credentials, options=[*options, *override])
