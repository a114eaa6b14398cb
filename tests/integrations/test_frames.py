"""The frames of a live stream for frameworks, which may take none for a while."""

import pytest

from avatar.client import Frame, PlaybackFinished, connect
from avatar.client import stream as client_stream
from avatar.integrations import frames as integration
from avatar.integrations.frames import live_frames
from avatar.store.sessions import SessionStore
from tests.conftest import RATE_HZ, speech
from tests.integrations.waiting import until
from tests.standin import standin_gateway

HELD = 13
BLOCK = 12


async def test_frames_that_nobody_takes_are_dropped_and_ends_of_turns_kept(
    store: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integration, "HELD_S", HELD / 25)
    monkeypatch.setattr(client_stream, "MAX_QUEUED_ITEMS", 4)
    async with (
        standin_gateway(store, max_unread_s=0.5) as gateway,
        connect(gateway.target) as avatar,
        live_frames(await avatar.create(b"face"), rate_hz=RATE_HZ) as frames,
    ):
        items = aiter(frames)
        await anext(items)
        await frames.stream.push(speech(0.1))
        await frames.stream.end_turn()
        await until(lambda: any(isinstance(item, PlaybackFinished) for item, _ in frames._held))
        next_frame = frames.stream._next_frame
        await until(lambda: frames.stream._next_frame > next_frame + HELD)
        newest = max(item.index for item, _ in frames._held if isinstance(item, Frame))
        ended, first, *others = [await anext(items) for _ in range(2 + BLOCK)]
    assert isinstance(ended[0], PlaybackFinished)
    taken = [item.index for item, _ in (first, *others) if isinstance(item, Frame)]
    assert newest <= taken[0]
    assert taken == list(range(taken[0], taken[0] + BLOCK + 1)), "none is dropped while they are taken"
    assert not first[1], "speech is dropped with its frames"
