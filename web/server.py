"""The page's HTTP: its files, what it may ask for, and the offer that begins a conversation."""

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
from web.browser_session import MAX_WAITING_S, Conversation
from web.playout import RATE_HZ
from web.text_to_speech import MAX_TEXT, Synthesiser

logger = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"
MAX_OFFER_BYTES = 256 << 10
# Nothing comes from elsewhere, and nobody else shows the page. Blobs are the picture that a person has chosen.
POLICY = "default-src 'self'; img-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
STATUS: Mapping[type[AvatarError], HTTPStatus] = {
    ConnectionLost: HTTPStatus.BAD_GATEWAY,
    NoCapacity: HTTPStatus.SERVICE_UNAVAILABLE,
}


class Front:
    """What answers the browser.

    portraits: the pictures that can be chosen, by name. max_peers: conversations at a time; num_peers: how many now.
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
        """Answer while the body runs; gives the page's address. Conversations end with it. OSError: a taken port."""
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
        """The routes."""
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
        """What the page needs to know."""
        about = {
            "portraits": list(self._portraits),
            "max_picture_bytes": self._limits.max_picture_bytes,
            "rate_hz": RATE_HZ,
            "max_clip_s": MAX_WAITING_S,
            "max_text": MAX_TEXT if self._synthesiser else 0,
        }
        return web.json_response(about)

    async def portrait(self, request: web.Request) -> web.FileResponse:
        """One of the pictures that can be chosen."""
        path = self._portraits.get(request.match_info["name"])
        if path is None:
            raise web.HTTPNotFound
        return web.FileResponse(path, headers={"Cache-Control": "max-age=3600"})

    async def offer(self, request: web.Request) -> web.Response:
        """Begin a conversation: a form with `sdp`, and `portrait` (a name) or `picture` (a file). Answers with `sdp`,
        the picture's `notice` and the promised `reaction_s`.

        Whatever is refused is refused with JSON: `error` says why, in words.
        """
        origin = request.headers.get("Origin")
        if origin and urlsplit(origin).netloc != request.host:
            return _refusal(HTTPStatus.FORBIDDEN, "Only the page itself may start a conversation.")
        if self.num_peers >= self._max_peers:
            text = f"All {self._max_peers} places are taken. Try again when somebody has left."
            return _refusal(HTTPStatus.SERVICE_UNAVAILABLE, text)
        self.num_peers += 1
        is_running = False
        try:
            form = await request.post()
            picture, sdp = self._picture(form), form.get("sdp")
            if picture is None or not isinstance(sdp, str):
                return _refusal(HTTPStatus.BAD_REQUEST, "An offer needs `sdp`, and `portrait` or `picture`.")
            answer = await self._begin(picture, sdp)
            is_running = True
            return web.json_response(answer)
        except web.HTTPRequestEntityTooLarge:
            text = f"The picture is too large: at most {self._limits.max_picture_bytes >> 20} MB are taken."
            return _refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text)
        except AvatarError as error:
            return _refusal(STATUS.get(type(error), HTTPStatus.BAD_REQUEST), str(error))
        except (ValueError, InvalidStateError) as error:
            return _refusal(HTTPStatus.BAD_REQUEST, f"The offer cannot be answered: {error}")
        finally:
            self.num_peers -= not is_running

    async def _begin(self, picture: bytes, sdp: str) -> dict[str, str | float]:
        """Have a conversation run; the answer to its offer. ValueError or InvalidStateError for an unfit offer."""
        promised = await self._avatar.capabilities()  # what was measured of late
        session = await self._avatar.create(picture)
        peer = RTCPeerConnection()
        conversation = Conversation(peer, session, self._synthesiser)
        try:
            await peer.setRemoteDescription(RTCSessionDescription(sdp, "offer"))
            await peer.setLocalDescription(await peer.createAnswer())
        except BaseException:
            await peer.close()
            await session.delete()
            raise
        task = self._group.create_task(self._converse(conversation))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return {"sdp": peer.localDescription.sdp, "notice": session.notice, "reaction_s": promised.reaction_s}

    def _picture(self, form: Mapping[str, object]) -> bytes | None:
        picture, name = form.get("picture"), form.get("portrait")
        if isinstance(picture, web.FileField):
            return picture.file.read()
        return self._portraits[name].read_bytes() if isinstance(name, str) and name in self._portraits else None

    async def _converse(self, conversation: Conversation) -> None:
        try:
            await conversation.run()
        except Exception:  # as for a request: what one browser meets must not end the others
            logger.exception("a conversation failed")
        finally:
            self.num_peers -= 1


def portraits(folder: Path) -> dict[str, Path]:
    """The pictures that ship with the repository, by name."""
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
