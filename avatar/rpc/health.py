"""Health check of a service: `python -m avatar.rpc.health HOST:PORT [SERVICE]`.

Exits with 0 if it serves; otherwise with 1 and a line that gives the reason. SERVICE is the full name of one service,
such as avatar.v1.AvatarService; without it, the server as a whole is checked.

If AVATAR_TLS_CERT and AVATAR_TLS_KEY are set, as they are for the server, the server must present exactly this
certificate, whatever names it is for. The check presents it too, to a server that asks for clients' certificates.
"""

import os
import socket
import ssl
import sys
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

ANSWER_S = 3.0


def problem(target: str, service: str = "", *, cert: Path | None = None, key: Path | None = None) -> str:
    """Return why the service at HOST:PORT does not serve; empty if it does. cert, key: files of a server with TLS."""
    request = health_pb2.HealthCheckRequest(service=service)
    try:
        with _channel(target, cert, key) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)  # comes without types
            answer = stub.Check(request, timeout=ANSWER_S)
    except grpc.RpcError as error:
        return f"{target}: {error.code().name}: {error.details()}"
    except OSError as error:
        return f"{target}: {error}"
    status: str = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return "" if status == "SERVING" else f"{target}: {status}"


def _channel(target: str, cert: Path | None, key: Path | None) -> grpc.Channel:
    if not cert or not key:
        return grpc.insecure_channel(target)
    chain = cert.read_bytes()
    credentials = grpc.ssl_channel_credentials(chain, key.read_bytes(), chain)
    return grpc.secure_channel(target, credentials, [("grpc.ssl_target_name_override", _name(target, cert, key))])


def _name(target: str, cert: Path, key: Path) -> str:
    """Return one of the names in the server's certificate: the address that is checked need not be one of them."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cert)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # trust the certificate itself, not its issuer
    context.load_cert_chain(cert, key)
    host, _, port = target.rpartition(":")
    with (
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_S) as plain,
        context.wrap_socket(plain) as connection,
    ):
        names: Any = (connection.getpeercert() or {}).get("subjectAltName", ())
    return next((value.replace("*", "any") for _, value in names), "")


def _file(variable: str) -> Path | None:
    name = os.environ.get(variable)
    return Path(name) if name else None


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    sys.exit(problem(*sys.argv[1:], cert=_file("AVATAR_TLS_CERT"), key=_file("AVATAR_TLS_KEY")) or None)
