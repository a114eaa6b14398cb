"""HTTP server of the page: its files, its settings, and the offer that starts a session."""

import logging
from asyncio import Task, TaskGroup
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import web
from aiortc import RTCPeerConnection, RTCSessionDescription
from aiortc.exceptions import InvalidStateError

from avatar.client import Avatar, AvatarError
from avatar.errors import ConnectionLost, NoCapacity
from avatar.v1.avatar_service_pb2 import GetCapabilitiesResponse
from web.browser_session import MAX_PENDING_S, BrowserSession
from web.playout import RATE_HZ
from web.text_to_speech import MAX_TEXT, Synthesiser

logger = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"
MAX_OFFER_BYTES = 256 << 10
# The page loads nothing from other sites and cannot be framed. Blobs are pictures that the user has selected.
POLICY = "default-src 'self'; img-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
STATUS: Mapping[type[AvatarError], HTTPStatus] = {
    ConnectionLost: HTTPStatus.BAD_GATEWAY,
    NoCapacity: HTTPStatus.SERVICE_UNAVAILABLE,
}


class PageServer:
    """Serves the page and runs its sessions.

    portraits: selectable pictures by name. max_peers: sessions at a time. num_peers: current sessions.
    """

    def __init__(
        self,
        avatar: Avatar,
        limits: GetCapabilitiesResponse,
        portraits: Mapping[str, Path],
        synthesiser: Synthesiser | None,
        max_peers: int,
    ) -> None:
        self.num_peers = 0
        self._avatar, self._limits, self._portraits = avatar, limits, portraits
        self._synthesiser, self._max_peers = synthesiser, max_peers
        self._group, self._tasks = TaskGroup(), set[Task[None]]()

    @asynccontextmanager
    async def serving(self, host: str, port: int) -> AsyncGenerator[str, None]:
        """Serve while the body runs; give the page's address. Sessions end with it. Raises OSError for a used port."""
        runner = web.AppRunner(self.application(), access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port).start()
            async with self._group:
                yield f"http://{host}:{runner.addresses[0][1]}"
                for task in self._tasks:
                    task.cancel()
        finally:
            await runner.cleanup()

    def application(self) -> web.Application:
        """Return the routes."""
        app = web.Application(client_max_size=self._limits.max_picture_bytes + MAX_OFFER_BYTES)
        app.on_response_prepare.append(_guard)
        app.router.add_get("/", _file("index.html"))
        app.router.add_get("/page.css", _file("page.css"))
        app.router.add_get("/page.js", _file("page.js"))
        app.router.add_get("/about", self.about)
        app.router.add_get("/portraits/{name}", self.portrait)
        app.router.add_post("/offer", self.offer)
        return app

    async def about(self, _: web.Request) -> web.Response:
        """Return the page's settings."""
        about = {
            "portraits": list(self._portraits),
            "max_picture_bytes": self._limits.max_picture_bytes,
            "rate_hz": RATE_HZ,
            "max_clip_s": MAX_PENDING_S,
            "max_text": MAX_TEXT if self._synthesiser else 0,
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

        The JSON response has `sdp`, the picture's `notice` and the promised `reaction_s`, or `error` with a reason.
        """
        origin = request.headers.get("Origin")
        if origin and urlsplit(origin).netloc != request.host:
            return _refusal(HTTPStatus.FORBIDDEN, "Only the page itself may start a session.")
        if self.num_peers >= self._max_peers:
            text = f"All {self._max_peers} sessions are in use. Try again later."
            return _refusal(HTTPStatus.SERVICE_UNAVAILABLE, text)
        self.num_peers += 1
        is_running = False
        try:
            form = await request.post()
            picture, sdp = self._picture(form), form.get("sdp")
            if picture is None or not isinstance(sdp, str):
                return _refusal(HTTPStatus.BAD_REQUEST, "An offer needs `sdp`, and `portrait` or `picture`.")
            answer = await self._start(picture, sdp)
            is_running = True
            return web.json_response(answer)
        except web.HTTPRequestEntityTooLarge:
            text = f"The picture is too large: at most {self._limits.max_picture_bytes >> 20} MB are accepted."
            return _refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text)
        except AvatarError as error:
            return _refusal(STATUS.get(type(error), HTTPStatus.BAD_REQUEST), str(error))
        except (ValueError, InvalidStateError) as error:
            return _refusal(HTTPStatus.BAD_REQUEST, f"The offer is invalid: {error}")
        finally:
            self.num_peers -= not is_running

    async def _start(self, picture: bytes, sdp: str) -> dict[str, str | float]:
        """Start a session and return the answer. Raises ValueError or InvalidStateError for a bad offer."""
        capabilities = await self._avatar.capabilities()  # with the latest measured reaction time
        session = await self._avatar.create(picture)
        peer = RTCPeerConnection()
        browser_session = BrowserSession(peer, session, self._synthesiser)
        try:
            await peer.setRemoteDescription(RTCSessionDescription(sdp, "offer"))
            await peer.setLocalDescription(await peer.createAnswer())
        except BaseException:
            await peer.close()
            await session.delete()
            raise
        task = self._group.create_task(self._run(browser_session))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return {"sdp": peer.localDescription.sdp, "notice": session.notice, "reaction_s": capabilities.reaction_s}

    def _picture(self, form: Mapping[str, object]) -> bytes | None:
        picture, name = form.get("picture"), form.get("portrait")
        if isinstance(picture, web.FileField):
            return picture.file.read()
        return self._portraits[name].read_bytes() if isinstance(name, str) and name in self._portraits else None

    async def _run(self, browser_session: BrowserSession) -> None:
        try:
            await browser_session.run()
        except Exception:  # a failed session must not end the others
            logger.exception("a browser session failed")
        finally:
            self.num_peers -= 1


def portraits(folder: Path) -> dict[str, Path]:
    """Return the repository's pictures by name."""
    paths = [folder / "portrait.png", *sorted((folder / "portraits").glob("*.png"))]
    return {path.stem: path for path in paths}


def _file(name: str) -> Callable[[web.Request], Awaitable[web.FileResponse]]:
    async def answer(_: web.Request) -> web.FileResponse:
        return web.FileResponse(PAGE / name, headers={"Cache-Control": "no-cache"})

    return answer


def _refusal(status: HTTPStatus, text: str) -> web.Response:
    return web.json_response({"error": text}, status=status)


async def _guard(_: web.Request, response: web.StreamResponse) -> None:
    response.headers["Content-Security-Policy"] = POLICY
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "no-referrer"
