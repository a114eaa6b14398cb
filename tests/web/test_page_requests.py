"""Tests of web.page_requests over sockets: requests that never end, other hosts, and too many of anything."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest

from avatar.store.sessions import SessionStore
from tests.web.page import MAX_PEERS, Page, serving
from tests.web.test_page_server import SDP, offer, until
from web import page_requests, page_server
from web.page_requests import is_allowed

REQUEST_S = 0.3
HEAD = "POST /offer HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
PART = '--b\r\nContent-Disposition: form-data; name="sdp"\r\n\r\nv='
SHORT_BODY = f"{HEAD}Content-Length: 9000\r\n\r\n{PART}"
UNFINISHED = {
    "nothing": "",
    "headers": "POST /offer HTTP/1.1\r\nHost: localhost\r\nX-Slow: ",
    "body": SHORT_BODY,
    "chunks": f"{HEAD}Transfer-Encoding: chunked\r\n\r\n5\r\n--b\r\n\r\n",
    "second request": "GET /about HTTP/1.1\r\nHost: localhost\r\n\r\nGET /about HTTP/1.1\r\n",
}


@pytest.fixture
async def hasty_page(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Page, None]:
    """A page that soon gives up on a request."""
    for module in (page_requests, page_server):
        monkeypatch.setattr(module, "REQUEST_S", REQUEST_S)
    monkeypatch.setattr(page_server, "LINGER_S", REQUEST_S)
    async with serving(store) as page:
        yield page


@asynccontextmanager
async def connection(page: Page) -> AsyncGenerator[tuple[asyncio.StreamReader, asyncio.StreamWriter], None]:
    url = urlsplit(page.url)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def request(page: Page, data: str) -> str:
    """Send raw bytes and return everything that comes back until the server closes the connection."""
    async with connection(page) as (reader, writer):
        writer.write(data.encode())
        return (await reader.read()).decode()


@pytest.mark.parametrize("kind", UNFINISHED)
async def test_a_request_that_does_not_end_is_closed(hasty_page: Page, kind: str) -> None:
    async with asyncio.timeout(20):
        answer = await request(hasty_page, UNFINISHED[kind])
    assert hasty_page.server.num_peers == 0
    if kind in ("body", "chunks"):
        assert "408" in answer
        assert "did not arrive within 0.3 s" in answer


async def test_chunks_without_end_are_closed(hasty_page: Page) -> None:
    async with connection(hasty_page) as (reader, writer), asyncio.timeout(20):
        writer.write(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n{len(PART):x}\r\n{PART}\r\n".encode())
        while not reader.at_eof() and not reader.exception():
            writer.write(b"1\r\nx\r\n")
            await asyncio.sleep(0.01)


async def test_half_sent_offers_take_no_slot(page: Page) -> None:
    async with connection(page) as (_, first), connection(page) as (_, second), connection(page) as (_, third):
        for writer in (first, second, third):
            writer.write(SHORT_BODY.encode())
        await asyncio.sleep(0.1)
        status, answer = await offer(page, {"sdp": "no description", "portrait": "portrait"})
    assert MAX_PEERS < 3
    assert (status, page.server.num_peers) == (400, 0), answer


async def test_idle_connections_do_not_close_the_page(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_requests, "MAX_CONNECTIONS", 4)
    url = urlsplit(page.url)
    connections = [await asyncio.open_connection(url.hostname, url.port) for _ in range(12)]
    answer = await request(page, "GET /about HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert "200 OK" in answer
    async with asyncio.timeout(10):
        for reader, _ in connections[:8]:
            assert await reader.read() == b""
    for _, writer in connections:
        writer.transport.abort()


async def test_an_offer_whose_browser_has_left_frees_its_slot(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    async def create(*_: Any, **__: Any) -> None:
        await asyncio.sleep(3600)

    monkeypatch.setattr(page.avatar, "create", create)
    task = asyncio.create_task(offer(page, {"sdp": SDP, "portrait": "portrait"}))
    await until(lambda: page.server.num_peers == 1)
    task.cancel()
    await until(lambda: page.server.num_peers == 0)
    assert page.server._connections.protected == set()


@pytest.mark.parametrize(
    "host",
    [
        "elsewhere.example",
        "elsewhere.example:8080",
        "localhost.elsewhere.example",
        "elsewhere.example@localhost",
        "localhost:x",
        "localhost/",
        "",
        "[",
    ],
)
async def test_a_request_for_another_host_is_refused(page: Page, host: str) -> None:
    answer = await request(page, f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
    assert "403" in answer.splitlines()[0]
    assert "--allow-host" in answer


async def test_a_rebound_name_cannot_start_a_session(page: Page) -> None:
    headers = {"Host": "elsewhere.example:80", "Origin": "http://elsewhere.example:80"}
    status, answer = await offer(page, {"sdp": "v=0", "portrait": "portrait"}, **headers)
    assert (status, page.server.num_peers) == (403, 0)
    assert "elsewhere.example" in answer["error"]


@pytest.mark.parametrize(
    "header", ["localhost", "LOCALHOST:80", "127.0.0.1:8080", "[::1]:8080", "localhost.", "127.1.2.3"]
)
def test_loopback_is_always_allowed(header: str) -> None:
    assert is_allowed(header, ())


def test_further_hosts_are_a_setting() -> None:
    assert is_allowed("Avatar.example:443", {"avatar.example"})
    assert not is_allowed("www.avatar.example", {"avatar.example"})
    assert not is_allowed("192.0.2.1:8080", {"avatar.example"})


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b"--b"),
        ("multipart/form-data; boundary=b", b"no part"),
        ("multipart/form-data; boundary=b", b"--b\r\nContent-Disposition: form-data\r\n\r\n1\r\n--b--\r\n"),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="sdp"\r\n'
            b"Content-Type: text/plain; charset=none\r\n\r\n1\r\n--b--\r\n",
        ),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="sdp"\r\n'
            b"Content-Transfer-Encoding: klingon\r\n\r\n1\r\n--b--\r\n",
        ),
        ("application/x-www-form-urlencoded", b"sdp=\xff&portrait=portrait"),
        ("application/json", b"[" * 100_000),
    ],
)
async def test_a_malformed_form_is_refused(page: Page, content_type: str, body: bytes) -> None:
    async with (
        aiohttp.ClientSession(headers={"Content-Type": content_type}) as client,
        client.post(f"{page.url}/offer", data=body) as response,
    ):
        assert (response.status, page.server.num_peers) == (400, 0)
        assert "The form is invalid" in (await response.json())["error"]


async def test_many_fields_are_refused(page: Page) -> None:
    form = aiohttp.FormData({f"field{number}": "x" for number in range(100)}, default_to_multipart=True)
    async with aiohttp.ClientSession() as client, client.post(f"{page.url}/offer", data=form) as response:
        assert (response.status, page.server.num_peers) == (413, 0)
        assert "at most 8 fields" in (await response.json())["error"]


async def test_an_offer_that_announces_too_much_is_refused_before_it_arrives(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_requests, "REQUEST_S", 60.0)
    async with asyncio.timeout(30), connection(page) as (reader, writer):
        writer.write(f"{HEAD}Content-Length: {10**12}\r\n\r\n{PART}".encode())
        assert b"413" in await reader.readline()
