"""Tests of web.pending_speech, and of what floods of messages leave in it."""

from types import SimpleNamespace
from typing import Any

import pytest
from aiortc import RTCPeerConnection

from web.browser_session import MAX_MESSAGE_BYTES, BrowserSession, command_from_json
from web.pending_speech import JOINED_BYTES, MAX_ITEMS, PendingSpeech
from web.playout import RATE_HZ


async def test_items_come_out_in_order_with_short_audio_joined() -> None:
    pending = PendingSpeech(60.0)
    items = [b"ab", b"cd", None, "text", b"ef", b"g" * JOINED_BYTES, b"hi"]
    for item in items:
        pending.put(item)
    got = [await pending.get() for _ in range(len(pending))]
    assert got == [b"abcd", None, "text", b"ef", b"g" * JOINED_BYTES, b"hi"]
    assert pending.seconds == 0


def test_audio_texts_and_turns_are_bounded_together() -> None:
    pending = PendingSpeech(1.0)
    pending.put(bytes(2 * RATE_HZ))
    assert not pending.is_full
    pending.put(b"\0\0")
    assert pending.is_full
    pending.clear()
    while not pending.is_full:
        pending.put("text")
    assert len(pending) == MAX_ITEMS


@pytest.mark.parametrize("message", [b"\0\0", b"\0", b"", "[" * 50_000, "{", '"' + "x" * 80_000, "{}"])
async def test_a_flood_of_messages_leaves_a_bounded_session(message: bytes | str) -> None:
    session: Any = SimpleNamespace(video=SimpleNamespace(width=64, height=64))
    peer = RTCPeerConnection()
    browser_session = BrowserSession(peer, session)
    for _ in range(3000 if len(message) < 10 else 50):
        browser_session._on_message(message)
        browser_session._end_turn()
    assert len(browser_session._pending) <= MAX_ITEMS + 1
    if message != b"\0\0":
        assert len(browser_session._pending) == 0
    await peer.close()


@pytest.mark.parametrize(
    "message", ["", "{", "[]", "1", '"text"', "NaN", "[" * MAX_MESSAGE_BYTES, '{"a":' * 20_000, "9" * 10_000]
)
def test_other_messages_than_objects_are_no_commands(message: str) -> None:
    assert command_from_json(message) is None
