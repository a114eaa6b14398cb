"""The address at which the other services reach a process."""

import asyncio
import ipaddress
import socket
from contextlib import suppress
from urllib.parse import urlsplit

from avatar.settings import Settings

RESOLVE_S = 2.0
# TEST-NET-1 of RFC 5737: no machine has this address, so the route to it is the default route.
ELSEWHERE = "192.0.2.1"


async def advertised_address(settings: Settings, port: int) -> str:
    """Return the settings' `advertise`, or else HOST:PORT of this process, which serves at `port`.

    HOST is that of `listen`. In place of a wildcard it is the local address of the route to Redis, or of the default
    route if the name of Redis cannot be resolved, or the loopback address. No packet is sent.
    """
    if settings.advertise:
        return settings.advertise
    host = settings.listen.rpartition(":")[0].strip("[]")
    address = await _resolved(host) or host
    if not address or _is_wildcard(address):
        store = await _resolved(urlsplit(settings.redis_url).hostname or "localhost")
        address = _local_address(store) or _local_address(ELSEWHERE) or "127.0.0.1"
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


async def _resolved(host: str) -> str:
    """Return one IP address of a host, empty if it has none."""
    with suppress(OSError):  # TimeoutError is one
        async with asyncio.timeout(RESOLVE_S):
            found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_DGRAM)
            return str(found[0][4][0])
    return ""


def _is_wildcard(address: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(address).is_unspecified
    return False


def _local_address(remote: str) -> str:
    """Return the local address of the route to an IP address, empty if there is none."""
    family = socket.AF_INET6 if ":" in remote else socket.AF_INET
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((remote, 9))  # a UDP socket's connect only selects a route
        return str(probe.getsockname()[0])
    return ""
