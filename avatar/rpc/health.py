"""Health check of a service: `python -m avatar.rpc.health HOST:PORT [SERVICE]`.

Exits with 0 if it serves; otherwise with 1 and a line that gives the reason. SERVICE is the full name of one service,
such as avatar.v1.AvatarService; without it, the server as a whole is checked.

If AVATAR_TLS_CERT and AVATAR_TLS_KEY are set, as they are for the server, the server must present exactly this
certificate, whatever names it is for. The check presents it too, to a server that asks for clients' certificates.

Containers run this file every few seconds, by `python -I -S`, so it imports nothing that starts slowly: it writes the
one gRPC call of grpc.health.v1 to a socket itself, as HTTP/2 frames, and needs neither a package nor `socket`, whose
import takes as long as all else.
"""

import _socket
import os
import sys

ANSWER_S = 3.0
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
# Types and flags of HTTP/2's frames (RFC 9113, section 6).
DATA, HEADERS, RST_STREAM, SETTINGS, GOAWAY = 0, 1, 3, 4, 7
END_STREAM, END_HEADERS = 1, 4
# Answers of grpc.health.v1 as bytes of its message: field 1, a number.
STATUSES = {b"": "UNKNOWN", b"\x08\x00": "UNKNOWN", b"\x08\x01": "", b"\x08\x02": "NOT_SERVING"}


def problem(
    target: str, service: str = "", *, cert: str | os.PathLike[str] = "", key: str | os.PathLike[str] = ""
) -> str:
    """Return why the service at HOST:PORT does not serve; empty if it does. cert, key: files of a server with TLS."""
    host, _, port = target.rpartition(":")
    try:
        connection = _connected(host.strip("[]"), int(port))
        try:
            if cert and key:
                connection = _secured(connection, cert, key)
            answer = _check(connection, "https" if cert and key else "http", service)
        finally:
            connection.close()
    except (OSError, ValueError) as error:
        return f"{target}: {error}"
    if answer is None:
        return f"{target}: does not answer health checks" + (f" of {service}" if service else "")
    status = STATUSES.get(answer, "SERVICE_UNKNOWN")
    return f"{target}: {status}" if status else ""


def _connected(host: str, port: int) -> _socket.socket:
    """Return a connection to the first of the host's addresses that takes one."""
    failure = OSError("the name has no address")
    # As bytes, since a string would import the codec of international names.
    for family, kind, protocol, _, address in _socket.getaddrinfo(host.encode(), port, 0, _socket.SOCK_STREAM):
        connection = _socket.socket(family, kind, protocol)
        connection.settimeout(ANSWER_S)
        try:
            connection.connect(address)
            return connection
        except OSError as error:
            connection.close()
            failure = error
    raise failure


def _secured(plain: _socket.socket, cert: str | os.PathLike[str], key: str | os.PathLike[str]) -> _socket.socket:
    import socket
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cert)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # trust the certificate itself, not its issuer
    context.load_cert_chain(cert, key)
    context.set_alpn_protocols(["h2"])
    taken = socket.socket(fileno=plain.detach())
    taken.settimeout(ANSWER_S)
    return context.wrap_socket(taken)


def _check(connection: _socket.socket, scheme: str, service: str) -> bytes | None:
    """Return the answer's message, None if the server ends the call without one."""
    fields = {
        ":method": "POST",
        ":scheme": scheme,
        ":path": "/grpc.health.v1.Health/Check",
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    # Each field as a literal that is not indexed, without Huffman coding (RFC 7541, section 6.2.2).
    headers = b"".join(b"\0" + _text(name) + _text(value) for name, value in fields.items())
    request = b"\x0a" + _text(service) if service else b""
    connection.sendall(
        PREFACE
        + _frame(SETTINGS, 0, 0, b"")
        + _frame(HEADERS, END_HEADERS, 1, headers)
        + _frame(DATA, END_STREAM, 1, b"\0" + len(request).to_bytes(4, "big") + request)
    )
    message = b""
    while len(head := _received(connection, 9)) == 9:
        size, kind, flags, stream_id = int.from_bytes(head[:3], "big"), head[3], head[4], head[5:]
        payload = _received(connection, size)
        if kind == DATA:
            message += payload
        on_call = stream_id == b"\0\0\0\x01"
        if kind in (RST_STREAM, GOAWAY) or (on_call and kind in (DATA, HEADERS) and flags & END_STREAM):
            break
    # A byte that says whether it is compressed, and four of length, come before the message.
    return message[5:] if len(message) >= 5 else None


def _received(connection: _socket.socket, size: int) -> bytes:
    """Return the next `size` bytes, fewer if the server closes before."""
    data = b""
    while len(data) < size and (piece := connection.recv(size - len(data))):
        data += piece
    return data


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def _text(value: str) -> bytes:
    """Return a string of at most 126 bytes after its length, as both HPACK and protobuf write it."""
    data = value.encode()
    if len(data) > 126:
        raise ValueError(f"a service's name has at most 126 bytes, got {len(data)}")
    return bytes([len(data)]) + data


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    files = {name: os.environ.get(f"AVATAR_TLS_{name.upper()}", "") for name in ("cert", "key")}
    sys.exit(problem(*sys.argv[1:], **files) or None)
