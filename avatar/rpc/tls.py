"""TLS of servers and channels, from PEM files.

A certificate's file holds its chain, the certificate itself first; an authority's file holds one or more certificates.
The files of a service come from AVATAR_* variables, which errors name.
"""

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc


def server_credentials(
    cert: Path | None, key: Path | None, client_ca: Path | None = None
) -> grpc.ServerCredentials | None:
    """Return a server's credentials, for one port; None (plain text) without a certificate and its key.

    client_ca: the authority of clients' certificates; with it, a client must show one. Files that change are read
    again for the next connection. ValueError names the AVATAR_TLS_* variable whose file cannot be used.
    """
    if cert is None or key is None:
        return None

    def configuration() -> grpc.ServerCertificateConfiguration:
        pair = _pair("AVATAR_TLS_CERT", cert, "AVATAR_TLS_KEY", key)
        authorities = _certificates("AVATAR_TLS_CLIENT_CA", client_ca) if client_ca else None
        return grpc.ssl_server_certificate_configuration([pair], authorities)

    files = [each for each in (cert, key, client_ca) if each]
    first = configuration()
    renewed: Any = _when_changed(files, configuration)  # may return None, which the stub does not allow
    return grpc.dynamic_ssl_server_credentials(first, renewed, client_ca is not None)


def worker_credentials(ca: Path | None, cert: Path | None, key: Path | None) -> grpc.ChannelCredentials | None:
    """Return the gateway's credentials as the workers' client; None (plain text) without an authority.

    cert, key: shown to workers that ask for one. ValueError names the AVATAR_WORKER_* variable whose file cannot be
    used.
    """
    if ca is None:
        return None
    authorities = _certificates("AVATAR_WORKER_CA", ca)
    if cert is None or key is None:
        return grpc.ssl_channel_credentials(authorities)
    secret, chain = _pair("AVATAR_WORKER_CERT", cert, "AVATAR_WORKER_KEY", key)
    return grpc.ssl_channel_credentials(authorities, secret, chain)


def peer_credentials(cert: Path | None, key: Path | None) -> grpc.ChannelCredentials | None:
    """Return a gateway's credentials as the client of another one; None (plain text) without a certificate and its key.

    It shows its own certificate, and trusts that and all others in the same file. ValueError names the AVATAR_TLS_*
    variable whose file cannot be used.
    """
    if cert is None or key is None:
        return None
    secret, chain = _pair("AVATAR_TLS_CERT", cert, "AVATAR_TLS_KEY", key)
    return grpc.ssl_channel_credentials(chain, secret, chain)


def channel_credentials(
    ca: Path | str | None = None, cert: Path | str | None = None, key: Path | str | None = None
) -> grpc.ChannelCredentials:
    """Return the credentials of the product team's client. OSError if a file cannot be read.

    ca: file of the authority that signed the gateway's certificate; without it, the public ones that grpcio brings.
    cert, key: files of the client's own certificate, for a gateway that asks for one.
    """
    ca_pem, key_pem, cert_pem = (Path(each).read_bytes() if each else None for each in (ca, key, cert))
    return grpc.ssl_channel_credentials(ca_pem, key_pem, cert_pem)


def _when_changed(
    files: list[Path], read: Callable[[], grpc.ServerCertificateConfiguration]
) -> Callable[[], grpc.ServerCertificateConfiguration | None]:
    """Return a function that reads the files again if one has changed; it gives None if none has."""

    def state() -> list[tuple[int, int]]:
        return [(each.stat().st_mtime_ns, each.stat().st_ino) for each in files]

    seen = state()

    def changed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal seen
        try:
            if (now := state()) == seen:
                return None
            renewed = read()
        except (OSError, ValueError):  # files are being replaced one by one: serve the old ones until they match
            return None
        seen = now
        return renewed

    return changed


def _certificates(variable: str, path: Path) -> bytes:
    content = _content(variable, path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError as error:
        raise _unusable(variable, path, "a PEM file of certificates") from error
    return content


def _pair(cert_variable: str, cert: Path, key_variable: str, key: Path) -> tuple[bytes, bytes]:
    """Return a private key and its certificate chain, in the order that gRPC takes them."""
    chain, secret = _certificates(cert_variable, cert), _content(key_variable, key)
    try:
        # Without a password, ssl would ask for an encrypted key's at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=lambda: "")
    except (ssl.SSLError, ValueError) as error:
        expected = f"the private key of {cert_variable}, in PEM and without a password"
        raise _unusable(key_variable, key, expected) from error
    return secret, chain


def _content(variable: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unusable(variable, path, f"a file that can be read: {error.strerror}") from error


def _unusable(variable: str, path: Path, expected: str) -> ValueError:
    return ValueError(f"{variable} is {str(path)!r}, expected {expected}")
