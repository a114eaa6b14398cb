"""HTTP server of the page: its files, its settings, and the offer that starts a session."""

import asyncio
import logging
from asyncio import Task, TaskGroup
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from aiohttp import web
from aiortc import RTCPeerConnection, RTCSessionDescription
from aiortc.sdp import SessionDescription

from avatar.client import Avatar, AvatarError
from avatar.errors import ConnectionLost, NoCapacity
from avatar.v1.avatar_service_pb2 import GetCapabilitiesResponse
from web.browser_session import MAX_PENDING_S, BrowserSession, stage_of
from web.page_requests import (
    LINGER_S,
    MAX_FIELDS,
    MAX_HEADERS,
    REQUEST_S,
    BoundedServer,
    Offer,
    only_hosts,
    read_offer,
    read_picture,
    refusal,
)
from web.playout import RATE_HZ
from web.words import form_words, lag_words, places_words

logger = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"
# Width and height of the page's screen before the first session, where a video can have any size.
USUAL_SIZE = 512, 512
MAX_SDP_BYTES = 64 << 10  # a browser's has about 5 KB
# Bytes of an offer's form beside the picture.
MAX_FORM_BYTES = MAX_SDP_BYTES + (16 << 10)
MEDIA = {"audio", "video", "application"}
NEGOTIATION_S = 20.0
# The gateway forgets a session this long after its last block, also one whose offer was cancelled.
SESSION_TTL_S = 60.0
# People's photos are seldom framed like a portrait.
FIT: Literal["face"] = "face"
# The page loads nothing from other sites and cannot be framed. Blobs are pictures that the user has selected.
POLICY = "default-src 'self'; img-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
STATUS: Mapping[type[AvatarError], HTTPStatus] = {
    ConnectionLost: HTTPStatus.BAD_GATEWAY,
    NoCapacity: HTTPStatus.SERVICE_UNAVAILABLE,
}


class PageServer:
    """Serves the page and runs its sessions.

    portraits: selectable pictures by name. max_peers: sessions at a time. hosts: names of this server besides
    loopback; requests for others are refused. num_peers: current sessions. num_checks: pictures being checked.
    label: draw "AI" into every frame.
    """

    def __init__(
        self,
        avatar: Avatar,
        limits: GetCapabilitiesResponse,
        portraits: Mapping[str, Path],
        max_peers: int,
        hosts: Collection[str] = (),
        *,
        label: bool = False,
    ) -> None:
        self.num_peers = self.num_checks = 0
        self._avatar, self._limits, self._portraits = avatar, limits, portraits
        self._max_peers, self._hosts, self._label = max_peers, hosts, label
        self._group, self._tasks = TaskGroup(), set[Task[None]]()

    @asynccontextmanager
    async def serving(self, host: str, port: int) -> AsyncGenerator[str, None]:
        """Serve while the body runs; give the page's address. Sessions end with it. Raises OSError for a used port."""
        runner = web.AppRunner(
            self.application(),
            access_log=None,
            handler_cancellation=True,  # an offer whose browser has left is given up
            keepalive_timeout=REQUEST_S,
            lingering_time=LINGER_S,
            max_headers=MAX_HEADERS,
        )
        await runner.setup()
        assert runner.server
        self._connections = BoundedServer(runner.server)
        try:
            listener = await asyncio.get_running_loop().create_server(self._connections, host, port)
            try:
                async with self._group:
                    yield f"http://{host}:{listener.sockets[0].getsockname()[1]}"
                    for task in self._tasks:
                        task.cancel()
            finally:
                listener.close()
        finally:
            await runner.cleanup()

    def application(self) -> web.Application:
        """Return the routes."""
        app = web.Application(
            client_max_size=self._limits.max_picture_bytes + MAX_FORM_BYTES,
            client_max_fields=MAX_FIELDS,
            middlewares=[only_hosts(self._hosts)],
        )
        app.on_response_prepare.append(_guard)
        app.router.add_get("/", _file("index.html"))
        for path in PAGE.iterdir():
            app.router.add_get(f"/{path.name}", _file(path.name))
        app.router.add_get("/about", self.about)
        app.router.add_get("/portraits/{name}", self.portrait)
        app.router.add_post("/offer", self.offer)
        app.router.add_post("/picture", self.picture)
        return app

    async def about(self, _: web.Request) -> web.Response:
        """Return the page's settings."""
        formats = [self._limits.video, *self._limits.video_formats]
        width, height = next(((each.width, each.height) for each in formats if each.width), USUAL_SIZE)
        about = {
            "width": width,
            "height": height,
            "portraits": list(self._portraits),
            "max_picture_bytes": self._limits.max_picture_bytes,
            "rate_hz": RATE_HZ,
            "max_clip_s": MAX_PENDING_S,
            "max_text": self._limits.max_text_chars,
            "listens": self._limits.listens,
        }
        return web.json_response(about)

    async def portrait(self, request: web.Request) -> web.FileResponse:
        """Return a selectable picture."""
        path = self._portraits.get(request.match_info["name"])
        if path is None:
            raise web.HTTPNotFound
        return web.FileResponse(path, headers={"Cache-Control": "max-age=3600"})

    async def offer(self, request: web.Request) -> web.Response:
        """Start a session from a form with `sdp`, and `portrait` (a name) or `picture` (a file).

        The JSON response has `sdp`, `width` and `height` of the video, a `notice` about the machine, a
        `picture_notice`, and the promised `reaction_s`; or `error` with a reason.
        """

        async def start() -> web.Response:
            return await self._start(request, await read_offer(request, self._portraits))

        return await self._answer(request, start)

    async def picture(self, request: web.Request) -> web.Response:
        """Check a picture: a form with `picture`. The JSON response has a `picture_notice`, or `error`."""

        async def check() -> web.Response:
            return await self._check(await read_picture(request))

        return await self._answer(request, check)

    async def _answer(self, request: web.Request, handle: Callable[[], Awaitable[web.Response]]) -> web.Response:
        """Handle a form of the page itself; a failure is answered in words for a person."""
        origin = request.headers.get("Origin")
        if origin and urlsplit(origin).netloc != request.host:
            return refusal(HTTPStatus.FORBIDDEN, "Only the page itself may send a form.")
        try:
            return await handle()
        except TimeoutError:
            response = refusal(HTTPStatus.REQUEST_TIMEOUT, f"The form did not arrive within {REQUEST_S:g} s.")
            response.force_close()
            return response
        except web.HTTPRequestEntityTooLarge:
            picture = f"a picture of at most {self._limits.max_picture_bytes >> 20} MB"
            text = f"The form is too large: send {picture}, in a form of at most {MAX_FIELDS} fields."
            return refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text)
        except AvatarError as error:
            logger.info("a form of the page failed", extra={"reason": error.reason, **stage_of(error)})
            return refusal(STATUS.get(type(error), HTTPStatus.BAD_REQUEST), form_words(error))
        except ValueError as error:
            return refusal(HTTPStatus.BAD_REQUEST, f"The form is invalid: {error}.")

    async def _check(self, picture: bytes) -> web.Response:
        """Check a picture, if not too many are being checked."""
        if self.num_checks >= self._max_peers:
            return refusal(HTTPStatus.SERVICE_UNAVAILABLE, places_words("Other pictures are being checked"))
        self.num_checks += 1
        try:
            return web.json_response({"picture_notice": await self._avatar.check_portrait(picture, fit=FIT)})
        finally:
            self.num_checks -= 1

    async def _start(self, request: web.Request, offer: Offer) -> web.Response:
        """Start a session for a complete offer, if there is a free slot."""
        if self.num_peers >= self._max_peers:
            text = places_words(f"All {self._max_peers} places are taken")
            return refusal(HTTPStatus.SERVICE_UNAVAILABLE, text)
        self.num_peers += 1
        self._connections.protected.add(request.protocol)
        is_running = False
        try:
            answer = await self._connect(offer)
            is_running = True
            return web.json_response(answer)
        finally:
            self.num_peers -= not is_running
            self._connections.protected.discard(request.protocol)

    async def _connect(self, offer: Offer) -> dict[str, str | float]:
        """Create a session, run it in the background, and return the answer. Raises ValueError for a bad offer."""
        check_sdp(offer.sdp)
        capabilities = await self._avatar.capabilities()  # with the latest measured reaction time
        session = await self._avatar.create(offer.picture, fit=FIT, ttl_s=SESSION_TTL_S, label=self._label)
        peer = RTCPeerConnection()
        browser_session = BrowserSession(peer, session, listens=capabilities.listens)
        try:
            sdp = await answer_sdp(peer, offer.sdp)
        except BaseException:
            with suppress(AvatarError):
                await session.delete()
            with suppress(AttributeError):  # aiortc's, for a connection that is only half made
                await peer.close()
            raise
        task = self._group.create_task(self._run(browser_session))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return {
            "sdp": sdp,
            "width": session.video.width,
            "height": session.video.height,
            "notice": lag_words(capabilities.sustained_rate),
            "picture_notice": session.notice,
            "reaction_s": capabilities.reaction_s,
        }

    async def _run(self, browser_session: BrowserSession) -> None:
        try:
            await browser_session.run()
        # A failed session must not end the others.
        except* (
            AvatarError
        ) as failed:  # without the messages, which may have the session's id: anyone with it can stream
            logger.error("a browser session failed: %s", [type(each).__name__ for each in failed.exceptions])
        except* Exception:
            logger.exception("a browser session failed")
        finally:
            self.num_peers -= 1


def check_sdp(offered: str) -> None:
    """Raise ValueError for a description that cannot be parsed or asks for too much; it has cost nothing by then."""
    if len(offered) > MAX_SDP_BYTES:
        raise ValueError(f"its `sdp` has {len(offered)} characters, the limit is {MAX_SDP_BYTES}")
    # Every section costs a transport, and audio or video that nobody reads would pile up.
    sections = [line[2:].partition(" ")[0] for line in offered.splitlines() if line.startswith("m=")]
    if not sections or not MEDIA.issuperset(sections) or len(sections) > len(set(sections)):
        raise ValueError(f"its `sdp` must have one section or more of {', '.join(sorted(MEDIA))}, each at most once")
    try:
        SessionDescription.parse(offered)
    except Exception as error:  # of many types, such as AssertionError and KeyError
        raise malformed_sdp(error) from error


async def answer_sdp(peer: RTCPeerConnection, offered: str) -> str:
    """Return a peer's answer to a description. Raises ValueError for a malformed one."""
    try:
        async with asyncio.timeout(NEGOTIATION_S):
            await peer.setRemoteDescription(RTCSessionDescription(offered, "offer"))
            await peer.setLocalDescription(await peer.createAnswer())
    except Exception as error:  # of as many types
        raise malformed_sdp(error) from error
    return str(peer.localDescription.sdp)


def malformed_sdp(error: Exception) -> ValueError:
    """Return the refusal of a description for which aiortc raised an error."""
    return ValueError(f"its `sdp` is malformed ({type(error).__name__}: {error})")


def portraits(folder: Path) -> dict[str, Path]:
    """Return the repository's pictures by name."""
    paths = [folder / "portrait.png", *sorted((folder / "portraits").glob("*.png"))]
    return {path.stem: path for path in paths}


def _file(name: str) -> Callable[[web.Request], Awaitable[web.FileResponse]]:
    async def answer(_: web.Request) -> web.FileResponse:
        return web.FileResponse(PAGE / name, headers={"Cache-Control": "no-cache"})

    return answer


async def _guard(_: web.Request, response: web.StreamResponse) -> None:
    response.headers["Content-Security-Policy"] = POLICY
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "no-referrer"
