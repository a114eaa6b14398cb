"""Tests of services.gateway.stream.outbox."""

import asyncio
from unittest.mock import AsyncMock

import pytest

from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import types_pb2 as types
from avatar.worker.v1 import types_pb2
from services.gateway.stream.outbox import MAX_WAITING_ITEMS, Item, Outbox
from services.gateway.stream.timeline import MediaGrid


async def test_messages_of_a_client_wait_while_too_many_events_are_waiting() -> None:
    """A client can cause any number of events by messages of a few bytes."""
    grid, position = MediaGrid(16000, 25, 12), types_pb2.Position()
    outbox = Outbox(grid, position, kept_frames=50, kept_bytes=1 << 20, max_unread_s=1.0, is_fragmented=False)
    for _ in range(MAX_WAITING_ITEMS):
        await outbox.wait_for_few_items()
        outbox.put(Item([pb.StreamAvatarResponse(event=pb.AvatarEvent())]))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await outbox.wait_for_few_items()
    outbox.finish()
    await outbox.drain(AsyncMock())
    await outbox.wait_for_few_items()


async def test_frames_that_another_gateway_sent_are_counted() -> None:
    outbox = Outbox(
        MediaGrid(16000, 25, 12),
        types_pb2.Position(next_frame=27),
        kept_frames=50,
        kept_bytes=1 << 20,
        max_unread_s=1.0,
        is_fragmented=False,
    )
    outbox.put(Item([pb.StreamAvatarResponse(frame=types.VideoFrame(num_frames=1))], num_frames=1))
    closed = Item([pb.StreamAvatarResponse(closed=pb.AvatarClosed())])
    outbox.put(closed)
    outbox.finish()
    await outbox.drain(AsyncMock())
    assert closed.messages[0].closed.num_frames == 25
