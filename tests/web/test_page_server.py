"""The page's HTTP server, and sessions with a WebRTC peer in place of a browser."""

import asyncio
import io
import json
import re
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp
import numpy as np
import pytest
from aiortc import AudioStreamTrack, MediaStreamTrack, RTCDataChannel, RTCPeerConnection, RTCSessionDescription
from av import AudioFrame, VideoFrame

from avatar.aio import background
from avatar.errors import VoiceFailed
from avatar.store.sessions import SessionStore
from benchmarks.standin.content import PUBLIC
from tests.services.voice.fakes import CHAR_S
from tests.web.page import ASSETS, MAX_PEERS, Page, serving
from web.__main__ import main
from web.playout import RATE_HZ

PICTURE = (ASSETS / "portraits/2.png").read_bytes()
# A description that can be parsed, and no more.
SDP = "v=0\r\nm=audio 9 UDP/TLS/RTP/SAVPF 0\r\n"
TONE = b"".join(round(8000 * ((i // 40) % 2 - 0.5)).to_bytes(2, "little", signed=True) for i in range(RATE_HZ))


async def get(url: str) -> tuple[int, Any, Any]:
    async with aiohttp.ClientSession() as client, client.get(url) as response:
        body = await response.read()
        return response.status, response.headers, body


async def offer(page: Page, fields: dict[str, Any], path: str = "offer", **headers: str) -> tuple[int, Any]:
    form = aiohttp.FormData(default_to_multipart=True)
    for name, value in fields.items():
        if isinstance(value, bytes):
            form.add_field(name, io.BytesIO(value), filename="face.png")
        else:
            form.add_field(name, value)
    async with (
        aiohttp.ClientSession() as client,
        client.post(f"{page.url}/{path}", data=form, headers=headers) as response,
    ):
        return response.status, await response.json()


async def until(state: Callable[[], object], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not state():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


@dataclass
class Peer:
    """A WebRTC peer that acts like the browser page."""

    connection: RTCPeerConnection
    channel: RTCDataChannel
    tracks: dict[str, MediaStreamTrack] = field(default_factory=dict)
    messages: list[dict[str, Any]] = field(default_factory=list)

    def command(self, kind: str, **fields: Any) -> None:
        self.channel.send(json.dumps({"type": kind, **fields}))

    def received(self, kind: str) -> list[dict[str, Any]]:
        return [item for item in self.messages if item["type"] == kind]

    def is_in(self, state: str) -> bool:
        return bool(states := self.received("state")) and states[-1]["state"] == state


@asynccontextmanager
async def connected(
    page: Page, microphone: MediaStreamTrack | None = None, **fields: Any
) -> AsyncGenerator[Peer, None]:
    connection = RTCPeerConnection()
    peer = Peer(connection, connection.createDataChannel("avatar"))
    connection.on("track", lambda track: peer.tracks.update({track.kind: track}))
    peer.channel.on("message", lambda message: peer.messages.append(json.loads(message)))
    if microphone:
        connection.addTrack(microphone)
    else:
        connection.addTransceiver("audio", "recvonly")
    connection.addTransceiver("video", "recvonly")
    await connection.setLocalDescription(await connection.createOffer())
    status, answer = await offer(page, {"sdp": connection.localDescription.sdp, "portrait": "portrait", **fields})
    assert status == 200, answer
    await connection.setRemoteDescription(RTCSessionDescription(answer["sdp"], "answer"))
    try:
        await until(lambda: peer.channel.readyState == "open")
        yield peer
    finally:
        await connection.close()


async def test_the_page_loads_nothing_from_other_sites(page: Page) -> None:
    for path in ("/", "/page.css", "/page.js", "/connection.js", "/portraits/2"):
        status, headers, body = await get(page.url + path)
        assert status == 200
        assert headers["Content-Security-Policy"].startswith("default-src 'self'")
        assert b"https://" not in body or path.startswith("/portraits")


async def test_only_the_repositorys_portraits_are_served(page: Page) -> None:
    for name in ("nobody", "..%2Fspeech.wav", "%2e%2e%2f%2e%2e%2fREADME.md", "portrait.png"):
        assert (await get(f"{page.url}/portraits/{name}"))[0] == 404


async def test_the_page_receives_the_gateways_limits(page: Page) -> None:
    about = json.loads((await get(f"{page.url}/about"))[2])
    assert (about["max_picture_bytes"], about["portraits"][0], about["max_text"]) == (2 << 20, "portrait", 10_000)
    assert (about["width"], about["height"]) == (64, 64)


@pytest.mark.parametrize(
    "fields",
    [
        {"portrait": "portrait"},
        {"sdp": "v=0"},
        {"sdp": "v=0", "portrait": "/etc/passwd"},
        {"sdp": "no offer", "portrait": "portrait"},
    ],
)
async def test_an_invalid_offer_is_refused_with_a_reason(page: Page, fields: dict[str, Any]) -> None:
    status, answer = await offer(page, fields)
    assert status == 400
    assert answer["error"]
    assert page.server.num_peers == 0


async def test_a_picture_over_the_gateways_limit_is_refused(page: Page) -> None:
    status, answer = await offer(page, {"sdp": "v=0", "picture": bytes(3 << 20)})
    assert (status, page.server.num_peers) == (413, 0)
    assert "at most 2 MB" in answer["error"]


async def test_the_gateways_refusal_of_a_picture_reaches_the_page_in_words(page: Page) -> None:
    page.gateway.vae.refusal = "not a PNG picture; send the bytes of such a file"
    status, answer = await offer(page, {"sdp": SDP, "picture": b"not a picture"})
    assert status == 400
    assert answer["error"] == "This picture cannot be used: it is not a PNG picture. Choose another one."


async def test_a_picture_is_checked_before_a_session_as_in_it(page: Page) -> None:
    page.gateway.vae.notice = "No face was found in this picture."
    status, answer = await offer(page, {"picture": PICTURE}, "picture")
    assert (status, answer) == (200, {"picture_notice": page.gateway.vae.notice})
    async with connected(page, picture=PICTURE):
        assert page.gateway.vae.pictures == [PICTURE] * 2
        assert page.gateway.vae.fits == ["face"] * 2
    page.gateway.vae.refusal = "damaged in a way that ends its decoder (SIGSEGV)"
    status, answer = await offer(page, {"picture": b"no picture"}, "picture")
    assert (status, page.server.num_checks) == (400, 0)
    assert answer["error"] == "This picture cannot be used: it is damaged. Choose another one."
    assert (await offer(page, {"portrait": "portrait"}, "picture"))[0] == 400


async def test_checks_of_pictures_are_bounded(page: Page) -> None:
    page.server.num_checks = MAX_PEERS
    status, answer = await offer(page, {"picture": PICTURE}, "picture")
    assert status == 503
    assert answer["error"] == "Other pictures are being checked. Try again in 10 seconds."


async def test_another_site_cannot_start_a_session(page: Page) -> None:
    assert (await offer(page, {"sdp": "v=0", "portrait": "portrait"}, Origin="https://elsewhere"))[0] == 403


async def test_an_uploaded_picture_reaches_the_gateway(page: Page) -> None:
    async with connected(page, picture=PICTURE):
        pass
    assert page.gateway.vae.pictures == [PICTURE]


async def test_the_page_labels_its_sessions_on_request(
    page: Page, store: SessionStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["web", "--target", page.gateway.target, "--listen", "127.0.0.1:0", "--label"]
    monkeypatch.setattr(sys, "argv", command)
    printed: list[str] = []
    labels: list[bool] = []
    async with background(main()) as running:
        while not printed:
            await asyncio.sleep(0.02)
            assert not running.done(), running.exception()
            printed = re.findall(r"http://\S+", capsys.readouterr().out)
        for url in (page.url, *printed):
            async with connected(replace(page, url=url)) as peer:
                await until(lambda: peer.is_in("idle"))
                labels.append((await store.session(page.gateway.audio.sessions[-1])).label)
    assert labels == [False, True]


async def test_sessions_are_bounded_and_free_again_when_a_browser_leaves(page: Page) -> None:
    async with connected(page):
        async with connected(page):
            status, answer = await offer(page, {"sdp": "v=0", "portrait": "portrait"})
            assert status == 503
            assert answer["error"] == f"All {MAX_PEERS} places are taken. Try again in 10 seconds."
        await until(lambda: page.server.num_peers == 1)
    await until(lambda: page.server.num_peers == 0 and page.gateway.num_streams == 0)


async def test_a_clip_is_spoken_with_video_and_audio(page: Page) -> None:
    async with connected(page) as peer:
        await until(lambda: peer.is_in("idle"))
        for start in range(0, len(TONE), 16000):
            peer.channel.send(TONE[start : start + 16000])
        peer.command("end_turn")
        await until(lambda: peer.is_in("speaking"))
        loudest = 0
        async with asyncio.timeout(10):
            while loudest < 2000:
                audio = await peer.tracks["audio"].recv()
                assert isinstance(audio, AudioFrame)
                loudest = int(np.abs(audio.to_ndarray()).max())
        frame = await peer.tracks["video"].recv()
        await until(lambda: peer.is_in("idle"))
        assert TONE in page.gateway.audio.received
        assert isinstance(frame, VideoFrame)
        assert (frame.width, frame.height) == (64, 64)
        assert 0 < peer.received("reaction")[0]["seconds"] < 5


async def test_the_microphone_may_be_what_the_avatar_listens_to(store: SessionStore) -> None:
    async with (
        serving(store, content=replace(PUBLIC, inputs=("heard",))) as page,
        connected(page, AudioStreamTrack()) as peer,
    ):
        assert json.loads((await get(f"{page.url}/about"))[2])["listens"]
        peer.command("microphone", use="talk")
        await until(lambda: len(page.gateway.audio.heard) > 10_000)
        assert not any(page.gateway.audio.received), "it is not spoken"
        assert peer.is_in("idle")


async def test_an_avatar_that_does_not_listen_says_so(page: Page) -> None:
    async with connected(page) as peer:
        peer.command("microphone", use="talk")
        await until(lambda: peer.received("notice") == [{"type": "notice", "text": "This avatar does not listen."}])


async def test_typed_text_is_spoken_by_the_gateways_voice(page: Page) -> None:
    async with connected(page) as peer:
        peer.command("text", text="good morning")
        await until(lambda: peer.is_in("speaking"))
        await until(lambda: peer.is_in("idle"))
        assert page.engine.sentences == ["good morning"]
        assert [peer.received("turn"), len(peer.received("finished"))] == [
            [{"type": "turn", "text": "good morning"}],
            1,
        ]
        states = [each["state"] for each in peer.received("state")]
        assert states[-3:] == ["preparing", "speaking", "idle"]
        assert len(page.gateway.audio.received.strip(b"\0")) == pytest.approx(2 * RATE_HZ * CHAR_S * 12, rel=0.02)
        assert 0 < peer.received("reaction")[0]["seconds"] < 5


async def test_a_failed_voice_is_reported(page: Page) -> None:
    page.engine.failure = VoiceFailed("the speech endpoint fails (status 503)")
    async with connected(page) as peer:
        peer.command("text", text="good morning")
        await until(lambda: peer.received("notice"))
        assert peer.received("notice")[0]["text"] == "The voice did not speak all of the text. Send the rest again."
        await until(lambda: peer.received("unspoken") and peer.is_in("idle"))


async def test_an_interrupt_drops_pending_speech(page: Page) -> None:
    async with connected(page) as peer:
        for _ in range(12):
            peer.channel.send(TONE)
        await until(lambda: peer.is_in("speaking") and not peer.channel.bufferedAmount)
        peer.command("interrupt")
        await until(lambda: peer.is_in("idle"), 3)
        (interrupted,) = peer.received("interrupted")
        assert interrupted["was_speaking"]
        assert 0 < interrupted["position_s"] < 12
        assert not peer.received("finished")


async def test_pending_speech_is_bounded_with_a_notice(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("web.browser_session.MAX_PENDING_S", 1.0)
    async with serving(store, live_ahead_s=1.0) as page, connected(page) as peer:
        for _ in range(8):
            peer.channel.send(TONE)
        await until(lambda: peer.received("notice"), 30)
        assert "Only 1 seconds" in peer.received("notice")[0]["text"]


async def test_invalid_messages_from_a_browser_are_refused(page: Page) -> None:
    async with connected(page) as peer:
        invalid = ("{", "[]", '"text"', "{}", '{"type": 5}', '{"type": "unknown"}', "[" * 60_000)
        for message in (*invalid, b"\x01"):
            peer.channel.send(message)
        peer.connection.createDataChannel("another")
        peer.command("interrupt")
        await until(lambda: peer.received("interrupted"))
        assert len(peer.received("notice")) == len(invalid)


async def test_a_malformed_description_is_refused(page: Page) -> None:
    connection = RTCPeerConnection()
    connection.createDataChannel("avatar")
    await connection.setLocalDescription(await connection.createOffer())
    sdp = connection.localDescription.sdp
    await connection.close()
    lines = sdp.splitlines()
    media = next(line for line in lines if line.startswith("m="))
    for malformed in (
        sdp + sdp,
        sdp.replace(media, f"{media}\r\n{media}"),
        sdp.replace(media, "m=text 9 RTP/AVP 0"),
        *("\r\n".join(line for line in lines if not line.startswith(start)) for start in ("m=", "a=setup", "a=ice-p")),
        sdp.replace("a=mid:", "a=max-message-size:x\r\na=mid:"),
        sdp + "a=x\r\n" * 20_000,
    ):
        status, answer = await offer(page, {"sdp": malformed, "portrait": "portrait"})
        assert (status, page.server.num_peers) == (400, 0), malformed
        assert "its `sdp`" in answer["error"]
    assert len(page.gateway.vae.pictures) == 2  # aiortc finds two of them wrong only when it connects
