"""Bounds of the page's HTTP requests: allowed hosts, connections, and the form that offers a session."""

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from aiohttp.web_protocol import RequestPayloadError

# Time for a request's headers and time for its body; also the longest time that an idle connection stays open.
REQUEST_S = 5.0
# Time in which the rest of a refused body is read, so that the browser reads the refusal instead of a reset.
LINGER_S = 2.0
MAX_CONNECTIONS = 256
MAX_HEADERS = 64
MAX_FIELDS = 8


@dataclass(frozen=True)
class Offer:
    """A complete offer of a session. sdp: WebRTC's description. picture: the bytes of a picture file."""

    sdp: str
    picture: bytes


class BoundedServer:
    """A protocol factory of an aiohttp server with at most `MAX_CONNECTIONS` connections.

    Beyond that, the oldest connections are closed, except those in `protected`: a client that opens many, or does not
    read its responses, must not keep others from the page.
    """

    def __init__(self, server: web.Server) -> None:
        self.protected: set[asyncio.BaseProtocol] = set()
        self._server = server

    def __call__(self) -> web.RequestHandler:
        """Return the protocol of a new connection."""
        others = [each for each in self._server.connections if each not in self.protected]
        for each in others[: max(0, len(others) - MAX_CONNECTIONS + 1)]:
            if each.transport:
                each.transport.abort()  # `close` would wait for a client that does not read
        return self._server()


def only_hosts(hosts: Collection[str]) -> Middleware:
    """Return a middleware that refuses requests for other hosts than loopback and `hosts`.

    Otherwise any site could reach the page's server from a visitor's browser by DNS rebinding: its name resolves to
    the server's address, and the browser takes both for the same origin.
    """
    allowed = {host.lower() for host in hosts}

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        header = request.headers.get("Host", "")
        if not is_allowed(header, allowed):
            text = f"The host {header[:80]!r} is not allowed. Use localhost, or start the page with --allow-host NAME."
            return refusal(HTTPStatus.FORBIDDEN, text)
        return await handler(request)

    return check


def is_allowed(header: str, allowed: Collection[str]) -> bool:
    """Return whether a Host header names loopback or one of the allowed hosts, with any port."""
    try:
        url = urlsplit(f"//{header}")
        host, _ = (url.hostname or "").rstrip("."), url.port
    except ValueError:
        return False
    if url.netloc != header or "@" in header:
        return False
    if host == "localhost" or host in allowed:
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


async def read_offer(request: web.Request, portraits: Mapping[str, Path]) -> Offer:
    """Read the form of an offer: `sdp`, and `portrait` (a name) or `picture` (a file). Errors as of `read_form`."""
    form = await read_form(request)
    picture, name, sdp = form.get("picture"), form.get("portrait"), form.get("sdp")
    if isinstance(picture, bytes):
        data = picture
    elif isinstance(name, str) and name in portraits:
        data = portraits[name].read_bytes()
    else:
        raise ValueError("it needs `portrait` (the name of one) or `picture` (a file)")
    if not isinstance(sdp, str):
        raise ValueError("it needs `sdp`")
    return Offer(sdp, data)


async def read_picture(request: web.Request) -> bytes:
    """Read the form of a picture to check: `picture` (a file). Errors as of `read_form`."""
    picture = (await read_form(request)).get("picture")
    if not isinstance(picture, bytes):
        raise ValueError("it needs `picture` (a file)")
    return picture


async def read_form(request: web.Request) -> dict[str, bytes | str]:
    """Return a form's files and texts by name.

    Raises ValueError for an invalid form, TimeoutError after `REQUEST_S`, and HTTPRequestEntityTooLarge.
    """
    if (size := request.content_length or 0) > request.client_max_size:
        raise web.HTTPRequestEntityTooLarge(request.client_max_size, size)
    try:
        async with asyncio.timeout(REQUEST_S):
            form = await request.post()
    except (ValueError, LookupError, RuntimeError, RequestPayloadError) as error:  # of aiohttp
        raise ValueError(f"its form cannot be read ({error})") from error
    return {name: value.file.read() if isinstance(value, web.FileField) else str(value) for name, value in form.items()}


def refusal(status: HTTPStatus, text: str) -> web.Response:
    """Return a response with a reason for a person."""
    return web.json_response({"error": text}, status=status)
