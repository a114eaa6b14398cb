"""TLS of servers and channels, from PEM files.

A certificate's file holds its chain, the certificate itself first; an authority's file one certificate or several.
"""

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from avatar.settings import PREFIX, GatewaySettings, Settings, unusable


def server_credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """What one server, at one port, shows and asks for; None where it speaks plain text.

    A certificate that is replaced is shown to the next connection. ValueError names a setting whose file is of no use.
    """
    cert, key, client_ca = settings.tls_cert, settings.tls_key, settings.tls_client_ca
    if cert is None or key is None:
        return None

    def configuration() -> grpc.ServerCertificateConfiguration:
        pair = _pair("tls_cert", cert, "tls_key", key)
        authorities = _certificates("tls_client_ca", client_ca) if client_ca else None
        return grpc.ssl_server_certificate_configuration([pair], authorities)

    files = [each for each in (cert, key, client_ca) if each]
    first = configuration()
    renewed: Any = _when_changed(files, configuration)  # may be None, which its type does not say
    return grpc.dynamic_ssl_server_credentials(first, renewed, client_ca is not None)


def worker_credentials(settings: GatewaySettings) -> grpc.ChannelCredentials | None:
    """What the gateway trusts and shows as the workers' client; None where they speak plain text.

    ValueError names a setting whose file is of no use.
    """
    if settings.worker_ca is None:
        return None
    authorities = _certificates("worker_ca", settings.worker_ca)
    if settings.worker_cert is None or settings.worker_key is None:
        return grpc.ssl_channel_credentials(authorities)
    key, chain = _pair("worker_cert", settings.worker_cert, "worker_key", settings.worker_key)
    return grpc.ssl_channel_credentials(authorities, key, chain)


def channel_credentials(
    ca: Path | str | None = None, cert: Path | str | None = None, key: Path | str | None = None
) -> grpc.ChannelCredentials:
    """What a client trusts and shows. OSError if a file cannot be read.

    ca: file of the authority that signed the gateway's certificate; without it, the public ones that grpcio brings.
    cert, key: files of the client's own certificate, for a gateway that asks for one.
    """
    ca_pem, key_pem, cert_pem = (Path(each).read_bytes() if each else None for each in (ca, key, cert))
    return grpc.ssl_channel_credentials(ca_pem, key_pem, cert_pem)


def _when_changed(
    files: list[Path], read: Callable[[], grpc.ServerCertificateConfiguration]
) -> Callable[[], grpc.ServerCertificateConfiguration | None]:
    """Reads again if a file has changed since; None if none has, or if they do not fit together yet."""

    def state() -> list[tuple[int, int]]:
        return [(each.stat().st_mtime_ns, each.stat().st_ino) for each in files]

    seen = state()

    def changed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal seen
        try:
            if (now := state()) == seen:
                return None
            renewed = read()
        except (OSError, ValueError):  # being replaced, one file after another: the old ones are good until then
            return None
        seen = now
        return renewed

    return changed


def _certificates(name: str, path: Path) -> bytes:
    content = _content(name, path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError as error:
        raise unusable(name, str(path), "a PEM file of certificates") from error
    return content


def _pair(cert_name: str, cert: Path, key_name: str, key: Path) -> tuple[bytes, bytes]:
    """Key and chain as gRPC takes them."""
    chain, secret = _certificates(cert_name, cert), _content(key_name, key)
    try:
        # An encrypted key would be asked for at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=lambda: "")
    except (ssl.SSLError, ValueError) as error:
        expected = f"the private key of {PREFIX}{cert_name.upper()}, in PEM and without a password"
        raise unusable(key_name, str(key), expected) from error
    return secret, chain


def _content(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise unusable(name, str(path), f"a file that can be read: {error.strerror}") from error
